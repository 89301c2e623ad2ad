"""A callback that evaluates a model on its slow weights."""

from typing import Any

import keras

from lookahead_optim._evaluation import Swapping
from lookahead_optim.keras._wrappers import optimizers_in
from lookahead_optim.keras.optimizer import Lookahead

__all__ = ["SwapSlowWeights"]


class SwapSlowWeights(Swapping, keras.callbacks.Callback):
    """Evaluates and predicts on the slow weights of a `Lookahead` optimizer, and lets callbacks keep the scored model.

    `fit(validation_data=...)`, `evaluate` and `predict` use the slow weights. Afterwards the fast weights are back bit
    for bit. The callback works like `keras.callbacks.SwapEMAWeights`.

    In `fit` the slow weights stay in the model from the validation until the next epoch begins. All callbacks find the
    slow weights at the end of the epoch, before or after this callback in `callbacks`. So `ModelCheckpoint` saves the
    weights that were scored, and `EarlyStopping(restore_best_weights=True)` restores them. A saved file has the fast
    weights too. `fit` with this callback resumes from the fast weights, so that `BackupAndRestore` continues bit for
    bit.

    Before the first training step nothing is swapped. Place this callback before other callbacks that put weights into
    the model for an evaluation. If a callback changes weights at the end of an epoch, it changes the slow weights in
    the model, and training continues from them.

    While the slow weights are in the model, a copy of the fast weights takes the memory of one more set of weights.

    Args:
        swap_on_epoch: Boolean, whether the slow weights are also in the model at the end of an epoch without a
            validation. If `True`, place this callback before the callbacks that need the slow weights. Defaults to
            `False`.

    Raises:
        TypeError: when `fit`, `evaluate` or `predict` begins, for a model of Keras 2.
        ValueError: at the first swap, if the model is not compiled with a `Lookahead` optimizer.
        RuntimeError: right after a sync, if another callback has put weights into the model before this callback.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(Lookahead("adam"), loss="mse")
    >>> x, y = keras.random.normal((32, 3)), keras.random.normal((32, 1))
    >>> history = model.fit(x, y, validation_data=(x, y), callbacks=[SwapSlowWeights()], verbose=0)
    >>> loss = model.evaluate(x, y, callbacks=[SwapSlowWeights()], verbose=0)
    """

    def set_model(self, model: Any) -> None:
        """Take the model that Keras trains or evaluates."""
        # PyTorch's `DistributedDataParallel` may be around the model.
        if not isinstance(getattr(model, "module", model), keras.Model):
            raise TypeError(
                "`lookahead_optim.keras.SwapSlowWeights` is for models of Keras 3. For Keras 2 there is "
                f"`lookahead_optim.tf_keras.SwapSlowWeights`. Received: model={model!r} of type {type(model)}"
            )
        super().set_model(model)

    def _lookahead(self) -> Lookahead:
        for optimizer in optimizers_in(self.model.optimizer):
            if isinstance(optimizer, Lookahead):
                return optimizer
        raise ValueError(
            "`SwapSlowWeights` needs a model compiled with a `lookahead_optim.keras.Lookahead` optimizer. "
            f"Received: model.optimizer={self.model.optimizer!r}"
        )
