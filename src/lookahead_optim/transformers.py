"""The Hugging Face `Trainer` with `Lookahead`: it keeps the model that it scored."""

import contextlib
from typing import TYPE_CHECKING, Any

from lookahead_optim._missing import explain_missing
from lookahead_optim.torch import Lookahead

with explain_missing("lookahead_optim.transformers", "transformers", "transformers"):
    import torch
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["SlowWeightsMixin"]

if TYPE_CHECKING:
    _AnyTrainer = Trainer
else:
    # The user's class brings its own `Trainer`, which may be any subclass.
    _AnyTrainer = object


class SlowWeightsMixin(_AnyTrainer):
    """Makes a `transformers.Trainer` train with `Lookahead`, and score and keep the slow weights.

    The mixin wraps the optimizer that the `Trainer` makes in `Lookahead`, with its two groups, with and without weight
    decay. It also wraps an optimizer that is passed as `optimizers`, unless it is a `Lookahead` already.

    - `evaluate` and `predict` score the slow weights. In `on_evaluate`, callbacks find the slow weights in the model.
    - `save_model`, `push_to_hub` and every checkpoint save the slow weights as the model. A checkpoint's optimizer file
      has the fast weights too, and training resumes from the checkpoint bit for bit. With `save_only_model=True` it
      resumes from the slow weights.
    - After `train` the model has the slow weights, or with `load_best_model_at_end` the slow weights with the best
      score. The optimizer's slow weights are then equal to the model's. Another `train` starts from them.

    Before the first training step, and without an optimizer, the model is scored and saved as it is.

    Args:
        *args: Positional arguments of the `Trainer`.
        lookahead_kwargs: Dictionary of arguments for `Lookahead`, such as `sync_period` and `slow_step_size`. Defaults
            to `None`: the defaults of `Lookahead`.
        **kwargs: Keyword arguments of the `Trainer`.

    Raises:
        TypeError: if the mixin comes after the `Trainer` in the bases of a class.
        ValueError: if `lookahead_kwargs` and a `Lookahead` are both given; with DeepSpeed, which trains copies of the
            weights; if the inner optimizer has weights of its own for evaluations, as `schedulefree` has.

    Example:

    >>> import tempfile, torch, transformers
    >>> class SlowWeightsTrainer(SlowWeightsMixin, transformers.Trainer):
    ...     pass
    >>> trainer = SlowWeightsTrainer(
    ...     torch.nn.Linear(2, 1),
    ...     transformers.TrainingArguments(tempfile.mkdtemp(), weight_decay=0.1, use_cpu=True, report_to=[]),
    ...     lookahead_kwargs={"sync_period": 5},
    ... )
    >>> optimizer = trainer.create_optimizer()
    >>> [(group["weight_decay"], group["sync_period"]) for group in optimizer.param_groups]
    [(0.1, 5), (0.0, 5)]

    References:
        Zhang, Lucas, Hinton and Ba, `Lookahead Optimizer: k steps forward, 1 step back
        <https://arxiv.org/abs/1907.08610>`__, 2019.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        bases = cls.__mro__
        if Trainer in bases and bases.index(Trainer) < bases.index(SlowWeightsMixin):
            raise TypeError(
                "`SlowWeightsMixin` must come before the `Trainer`, whose methods would hide its own. "
                f"Received: class {cls.__name__}({', '.join(base.__name__ for base in cls.__bases__)})"
            )

    def __init__(self, *args: Any, lookahead_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.lookahead_kwargs = lookahead_kwargs
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled:
            raise ValueError(
                "`SlowWeightsMixin` does not work with DeepSpeed, whose optimizer moves weights of its own, and which "
                "may make the optimizer itself. Received: a `Trainer` with DeepSpeed"
            )
        if lookahead_kwargs is not None and _find_lookahead(self.optimizer) is not None:
            raise ValueError(
                "`lookahead_kwargs` must not be given with a `Lookahead` in `optimizers`, which has its own settings. "
                f"Received: lookahead_kwargs={lookahead_kwargs!r}"
            )
        # First in the list, as other callbacks upload the model at the end of training.
        self.callback_handler.callbacks.insert(0, _SlowWeightsAtTheEnd())

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimizer as the `Trainer` does, and wrap it in `Lookahead` unless it is wrapped.

        Returns:
            The `Lookahead`, or a wrapper of Accelerate around it.
        """
        optimizer = super().create_optimizer(*args, **kwargs)
        lookahead = _find_lookahead(optimizer)
        if lookahead is None:
            optimizer = self.optimizer = lookahead = Lookahead(optimizer, **(self.lookahead_kwargs or {}))
        if callable(getattr(lookahead, "eval", None)):
            raise ValueError(
                "`SlowWeightsMixin` needs an optimizer that moves the model's own weights, the same in evaluations. "
                f"Received: {type(lookahead.inner_optimizer).__name__}, which has an `eval` method"
            )
        return optimizer

    def slow_weights(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager for a block with the slow weights in the model, such as an evaluation of your own.

        Before the optimizer exists, the block has the model's own weights.
        """
        lookahead = _find_lookahead(self.optimizer)
        return contextlib.nullcontext() if lookahead is None else lookahead.slow_weights()

    # A block inside a block changes nothing. The block in `evaluate` is also open for the callbacks after the loop.
    # `predict` runs the loop too, and a subclass' `evaluate` may run it.

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.slow_weights():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self.slow_weights():
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        with self.slow_weights():
            super().save_model(*args, **kwargs)

    # Both files are saved in one block: the optimizer's file has the fast weights only if it is made in a block.

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.slow_weights():
            super()._save_checkpoint(*args, **kwargs)

    def _tune_save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.slow_weights():
            super()._tune_save_checkpoint(*args, **kwargs)


class _SlowWeightsAtTheEnd(TrainerCallback):
    """Leaves the slow weights in the model, unless the best weights are there, and captures them from the model."""

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        lookahead = _find_lookahead(optimizer)
        if lookahead is None:
            return
        if not (args.load_best_model_at_end and state.best_model_checkpoint is not None):
            parameters = [parameter for group in lookahead.param_groups for parameter in group["params"]]
            with lookahead.slow_weights():
                slow_weights = [parameter.detach().clone() for parameter in parameters]
            with torch.no_grad():
                for parameter, slow in zip(parameters, slow_weights):
                    parameter.copy_(slow)
        lookahead.reset_slow_weights()


def _find_lookahead(optimizer: Any) -> Lookahead | None:
    """Return the `Lookahead` that an optimizer is, or that Accelerate has wrapped, or `None`."""
    while optimizer is not None and not isinstance(optimizer, Lookahead):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
