"""A callback that evaluates a model on its slow weights."""

from lookahead_optim._evaluation import Swapping
from lookahead_optim.tf_keras._keras import keras
from lookahead_optim.tf_keras.optimizer import Lookahead

__all__ = ["SwapSlowWeights"]


class SwapSlowWeights(Swapping, keras.callbacks.Callback):
    """Evaluates and predicts on the slow weights of a `Lookahead` optimizer.

    `fit(validation_data=...)`, `evaluate` and `predict` then see the slow weights; afterwards the fast ones are back
    bit for bit. It does what `lookahead_optim.keras.SwapSlowWeights` does in Keras 3.

    Args:
        swap_on_epoch: Boolean, whether the slow weights also stay in the model from the end of each epoch (after its
            validation) to the beginning of the next, so that `ModelCheckpoint` and other callbacks find them there.
            Give this callback before those in `callbacks`. Defaults to `False`.

    Raises:
        ValueError: at the first swap, when the model is not compiled with a `Lookahead` optimizer.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(Lookahead("adam"), loss="mse")
    >>> x, y = keras.backend.random_normal((32, 3)), keras.backend.random_normal((32, 1))
    >>> history = model.fit(x, y, validation_data=(x, y), callbacks=[SwapSlowWeights()], verbose=0)
    """

    # Private: there is no public way to say that the batch hooks need no numbers, for which Keras waits for the device.
    _supports_tf_logs = True

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
