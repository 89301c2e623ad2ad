"""A callback that evaluates a model on its slow weights."""

from typing import Any

import keras

from lookahead_optim._evaluation import Swapping
from lookahead_optim.keras._wrappers import optimizers_in
from lookahead_optim.keras.optimizer import Lookahead

__all__ = ["SwapSlowWeights"]


class SwapSlowWeights(Swapping, keras.callbacks.Callback):
    """Evaluates and predicts on the slow weights of a `Lookahead` optimizer.

    `fit(validation_data=...)`, `evaluate` and `predict` then see the slow weights; afterwards the fast ones are back
    bit for bit. Shaped like `keras.callbacks.SwapEMAWeights`.

    Before the first training step nothing is swapped. Give this callback before others that put weights into the model
    for an evaluation.

    While the slow weights are in the model, a copy of the fast ones takes the memory of one more set of weights.

    Args:
        swap_on_epoch: Boolean, whether the slow weights also stay in the model from the end of each epoch (after its
            validation) to the beginning of the next, so that `ModelCheckpoint` and other callbacks find them there.
            Give this callback before those in `callbacks`. A model saved so has no fast weights in its file: training
            that goes on from it restarts from the slow ones. Defaults to `False`.

    Raises:
        ValueError: at the first swap, when the model is not compiled with a `Lookahead` optimizer.
        RuntimeError: right after a sync, when another callback has put weights into the model before this one.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(Lookahead("adam"), loss="mse")
    >>> x, y = keras.random.normal((32, 3)), keras.random.normal((32, 1))
    >>> history = model.fit(x, y, validation_data=(x, y), callbacks=[SwapSlowWeights()], verbose=0)
    >>> loss = model.evaluate(x, y, callbacks=[SwapSlowWeights()], verbose=0)
    """

    def _averages(self) -> dict[int, Any]:
        averages: dict[int, Any] = {}
        for optimizer in optimizers_in(self.model.optimizer):
            if not isinstance(optimizer, Lookahead) and optimizer.use_ema and optimizer.built:
                # Private: `SwapEMAWeights` takes them by these names too, and there are no others.
                found = zip(optimizer._trainable_variables, optimizer._model_variables_moving_average)
                averages |= {id(weight): average for weight, average in found if average is not None}
        return averages

    def _lookahead(self) -> Lookahead:
        for optimizer in optimizers_in(self.model.optimizer):
            if isinstance(optimizer, Lookahead):
                return optimizer
        raise ValueError(
            "`SwapSlowWeights` needs a model compiled with a `lookahead_optim.keras.Lookahead` optimizer. "
            f"Received: model.optimizer={self.model.optimizer!r}"
        )
