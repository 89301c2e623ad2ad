"""A Lightning callback that validates and saves a model on its slow weights."""

import contextlib
import functools
import importlib
import warnings
from typing import TYPE_CHECKING, Any

from lookahead_optim._missing import explain_missing

with explain_missing("lookahead_optim.lightning", "lightning", "torch"):
    import torch
    from torch import Tensor
    from torch.nn.parameter import is_lazy

from lookahead_optim.torch._fsdp import local

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    # Lightning is two packages, each with its own classes. The trainer of one package refuses a callback of the other.
    _callbacks = []
    for _package in ("lightning.pytorch", "pytorch_lightning"):
        with contextlib.suppress(ModuleNotFoundError):
            _callbacks.append(importlib.import_module(_package).Callback)
    if not _callbacks:
        raise ModuleNotFoundError(
            "`lookahead_optim.lightning` needs the package `lightning` or `pytorch_lightning`: "
            "pip install 'lookahead-optim[lightning]'",
            name="lightning",
        )
    Callback = type("Callback", tuple(_callbacks), {})

__all__ = ["SlowWeights"]


class SlowWeights(Callback):
    """Validates and saves a model on the slow weights of its `lookahead_optim.torch.Lookahead` optimizers.

    The slow weights are in the model at these times:

    - In each validation of `Trainer.fit`. Afterwards the fast weights are back bit for bit.
    - In each checkpoint. `ModelCheckpoint`, also with `save_weights_only=True`, or `trainer.save_checkpoint` may save
      it. The checkpoint's `state_dict` has the slow weights, so that `load_from_checkpoint` gives the model that was
      scored. The optimizers' state in the checkpoint has the fast weights too. `fit(ckpt_path=...)` resumes bit for
      bit, with or without this callback.
    - After `fit`, however it ended. A test, a prediction or an export then uses the slow weights of the last step.
      Training also resumes bit for bit from a checkpoint that is saved then.

    Outside of `fit` the callback leaves the model alone. `trainer.validate`, `test` and `predict` score the weights in
    the model: the slow weights after `fit`, or the weights of a checkpoint.

    Some of the optimizers may be other than `Lookahead`. Their parameters stay as they are. Give each trainer its own
    callback. Buffers, such as the statistics of BatchNorm, are not exchanged.

    A strategy that restores optimizers itself, such as `ModelParallelStrategy`, cannot load fast weights from the
    optimizers' state. With it the slow weights are only in checkpoints with `save_weights_only=True`, and a warning
    says so.

    Raises:
        ValueError: when `fit` begins, if no optimizer is a `Lookahead`, or if a `Lookahead` has an `eval` method. Inner
            optimizers such as `schedulefree` have `eval`, which puts other weights into the model.

    Example:

    >>> import lightning
    >>> best = lightning.pytorch.callbacks.ModelCheckpoint(monitor="score")
    >>> trainer = lightning.Trainer(callbacks=[SlowWeights(), best], accelerator="cpu", logger=False)

    After `trainer.fit(module)` the file `best.best_model_path` has the slow weights with the best score.

    Reference:
        `lightning.pytorch.callbacks.WeightAveraging`, which does the same for an average of the weights.
    """

    def __init__(self) -> None:
        self._optimizers: list[Any] = []
        self._validation = contextlib.ExitStack()
        # The fast weights after training, when the model has the slow weights.
        self._fast: list[Tensor] = []

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        # A wrapper that passes on the attributes of the optimizer inside it has `slow_weights` too.
        self._optimizers = [optimizer for optimizer in trainer.optimizers if hasattr(optimizer, "slow_weights")]
        self._fast = []
        if not self._optimizers:
            raise ValueError(
                "`SlowWeights` needs a `lookahead_optim.torch.Lookahead` among the optimizers that "
                f"`configure_optimizers` returns. Received: {trainer.optimizers!r}"
            )
        if any(callable(getattr(optimizer, "eval", None)) for optimizer in self._optimizers):
            raise ValueError(
                "`SlowWeights` needs inner optimizers without `eval()`, which puts other weights into the model for a "
                f"validation. Received: {self._optimizers!r}"
            )
        if not trainer.strategy.lightning_restore_optimizer:
            # `torch.distributed.checkpoint` loads only what a new optimizer has, and a new optimizer has no fast
            # weights.
            warnings.warn(
                "`SlowWeights` leaves the fast weights in checkpoints from which training resumes, as "
                f"{type(trainer.strategy).__name__} could not load them from elsewhere. Those that are saved with "
                "`save_weights_only=True` have the slow weights.",
                stacklevel=2,
            )
        # Lightning has no hook for the end of a save. If only weights are saved, callbacks have no hook at all.
        trainer.save_checkpoint = functools.partial(self._save, trainer)  # type: ignore[method-assign]

    def on_validation_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if self._is_training():
            self._validation.enter_context(self._slow_weights())

    def on_validation_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._validation.close()

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._end()

    def on_fit_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        # There was no training if `fit` resumed from a checkpoint of its end.
        self._end()

    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        self._end()

    def _is_training(self) -> bool:
        return bool(self._optimizers) and not self._fast

    def _slow_weights(self) -> contextlib.ExitStack:
        """Open a `slow_weights()` block of each optimizer."""
        with contextlib.ExitStack() as stack:
            for optimizer in self._optimizers:
                stack.enter_context(optimizer.slow_weights())
            return stack.pop_all()

    def _parameters(self) -> list[Tensor]:
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        parameters = dict.fromkeys(parameter for group in groups for parameter in group["params"])
        return local([parameter.detach() for parameter in parameters if not is_lazy(parameter)])

    def _end(self) -> None:
        """Put the slow weights into the model for good."""
        self._validation.close()
        if self._is_training():
            parameters = self._parameters()
            fast = [parameter.to("cpu", copy=True) for parameter in parameters]
            with self._slow_weights():
                slow = [parameter.clone() for parameter in parameters]
            torch._foreach_copy_(parameters, slow)
            self._fast = fast

    def _save(
        self, trainer: "Trainer", filepath: Any, weights_only: bool | None = None, storage_options: Any = None
    ) -> None:
        save = functools.partial(type(trainer).save_checkpoint, trainer, filepath, weights_only, storage_options)
        has_both = weights_only or trainer.strategy.lightning_restore_optimizer
        shown = self._slow_weights if has_both else contextlib.nullcontext
        if self._is_training():
            with shown():
                return save()
        # Save as in training if the model still has the slow weights. A program may have put other weights there.
        parameters = self._parameters()
        present = [parameter.clone() for parameter in parameters]
        torch._foreach_copy_(parameters, self._fast)
        try:
            with self._slow_weights():
                is_unchanged = all(map(torch.equal, parameters, present))
            if trainer.strategy.reduce_boolean_decision(is_unchanged):
                with shown():
                    return save()
        finally:
            torch._foreach_copy_(parameters, present)
        return save()
