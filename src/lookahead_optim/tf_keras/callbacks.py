"""A callback that evaluates a model on its slow weights."""

from typing import Any

from lookahead_optim._evaluation import Swapping
from lookahead_optim.tf_keras._keras import keras
from lookahead_optim.tf_keras.optimizer import Lookahead

__all__ = ["SwapSlowWeights"]


class SwapSlowWeights(Swapping, keras.callbacks.Callback):
    """Evaluates and predicts on the slow weights of a `Lookahead` optimizer, and lets callbacks keep what was scored.

    `fit(validation_data=...)`, `evaluate` and `predict` see the slow weights. Afterwards the fast ones are back bit for
    bit. It does what `lookahead_optim.keras.SwapSlowWeights` does in Keras 3.

    In `fit` the slow weights stay in the model from the validation until the next epoch begins. All callbacks find them
    at the end of the epoch, before or after this one in `callbacks`: `ModelCheckpoint` saves the weights that were
    scored, and `EarlyStopping(restore_best_weights=True)` restores them. Files with the optimizer's state have the fast
    weights beside them. `fit` with this callback resumes from these, so that `BackupAndRestore` continues bit for bit.

    Args:
        swap_on_epoch: Boolean, whether the slow weights also are in the model at the end of an epoch without a
            validation. Give this callback then before those in `callbacks` that shall find them. Defaults to `False`.

    Raises:
        TypeError: when `fit`, `evaluate` or `predict` begins, for a model of Keras 3.
        ValueError: at the first swap, when the model is not compiled with a `Lookahead` optimizer.
        RuntimeError: right after a sync, when another callback has put weights into the model before this one.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(Lookahead("adam"), loss="mse")
    >>> x, y = keras.backend.random_normal((32, 3)), keras.backend.random_normal((32, 1))
    >>> history = model.fit(x, y, validation_data=(x, y), callbacks=[SwapSlowWeights()], verbose=0)
    """

    # Private: there is no public way to say that the batch hooks need no numbers, for which Keras waits for the device.
    _supports_tf_logs = True

    def set_model(self, model: Any) -> None:
        """Take the model that Keras trains or evaluates."""
        if not isinstance(model, keras.Model):
            raise TypeError(
                "`lookahead_optim.tf_keras.SwapSlowWeights` is for models of Keras 2. For Keras 3 there is "
                f"`lookahead_optim.keras.SwapSlowWeights`. Received: model={model!r} of type {type(model)}"
            )
        super().set_model(model)

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        # The fast weights must be back before any `on_train_end`, in which `EarlyStopping` restores the best weights.
        # Keras 3 tells the optimizer of the end of a training before that; Keras 2 tells only its newer optimizers. Its
        # `History`, which is the last callback of every `fit`, stands in for it.
        history = self._history = getattr(self.model, "history", None)
        if history is None:
            # A loop of the user's own calls the callbacks.
            return
        record = history.on_epoch_end

        def on_epoch_end(epoch: int, logs: Any = None) -> None:
            record(epoch, logs)
            if self.model.stop_training or epoch + 1 == self.params["epochs"]:
                self._swap_out()

        history.on_epoch_end = on_epoch_end

    def on_train_end(self, logs: Any = None) -> None:
        super().on_train_end(logs)
        if self._history is not None:
            vars(self._history).pop("on_epoch_end", None)

    def _lookahead(self) -> Lookahead:
        # Under mixed precision a `LossScaleOptimizer` is around it.
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        for candidate in (self.model.optimizer, optimizer):
            if isinstance(candidate, Lookahead):
                return candidate
        raise ValueError(
            "`SwapSlowWeights` needs a model compiled with a `lookahead_optim.tf_keras.Lookahead` optimizer. "
            f"Received: model.optimizer={self.model.optimizer!r}"
        )
