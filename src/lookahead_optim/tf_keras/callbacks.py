"""A callback that evaluates a model on its slow weights."""

from typing import Any

from lookahead_optim._evaluation import Swapping
from lookahead_optim.tf_keras._keras import keras
from lookahead_optim.tf_keras.optimizer import Lookahead

__all__ = ["SwapSlowWeights"]


class SwapSlowWeights(Swapping, keras.callbacks.Callback):
    """Evaluates and predicts on the slow weights of a `Lookahead` optimizer, and lets callbacks keep the scored model.

    `fit(validation_data=...)`, `evaluate` and `predict` use the slow weights. Afterwards the fast weights are back bit
    for bit. The callback does the same as `lookahead_optim.keras.SwapSlowWeights` in Keras 3.

    In `fit` the slow weights stay in the model from the validation until the next epoch begins. All callbacks find the
    slow weights at the end of the epoch, before or after this callback in `callbacks`. So `ModelCheckpoint` saves the
    weights that were scored, and `EarlyStopping(restore_best_weights=True)` restores them. A file with the optimizer's
    state has the fast weights too. `fit` with this callback resumes from the fast weights, so that `BackupAndRestore`
    continues bit for bit.

    While the slow weights are in the model, a copy of the fast weights takes the memory of one more set of weights.

    Args:
        swap_on_epoch: Boolean, whether the slow weights are also in the model at the end of an epoch without a
            validation. If `True`, place this callback before the callbacks that need the slow weights. Defaults to
            `False`.

    Raises:
        TypeError: when `fit`, `evaluate` or `predict` begins, for a model of Keras 3.
        ValueError: at the first swap, if the model is not compiled with a `Lookahead` optimizer.
        RuntimeError: right after a sync, if another callback has put weights into the model before this callback.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(Lookahead("adam"), loss="mse")
    >>> x, y = keras.backend.random_normal((32, 3)), keras.backend.random_normal((32, 1))
    >>> history = model.fit(x, y, validation_data=(x, y), callbacks=[SwapSlowWeights()], verbose=0)
    """

    # Private: it says that the batch hooks need no numbers. Otherwise Keras waits for the device. No public way says
    # so.
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
        # Before that, Keras 3 tells the optimizer that the training ends. Keras 2 tells only its newer optimizers. So
        # the `History`, which is the last callback of every `fit`, is used in its place.
        history = self._history = getattr(self.model, "history", None)
        if history is None:
            # A training loop of the user's calls the callbacks.
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
        # Under mixed precision a `LossScaleOptimizer` is around the optimizer.
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        for candidate in (self.model.optimizer, optimizer):
            if isinstance(candidate, Lookahead):
                return candidate
        raise ValueError(
            "`SwapSlowWeights` needs a model compiled with a `lookahead_optim.tf_keras.Lookahead` optimizer. "
            f"Received: model.optimizer={self.model.optimizer!r}"
        )
