"""The learning rate schedule of `RectifiedAdam` with `total_steps`, `warmup_proportion` and `min_lr`."""

from typing import Any

import keras
from keras import ops

from lookahead_optim._adam_settings import check_setting, check_total_steps, check_warm_up

__all__ = ["WarmUp"]


class WarmUp(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that rises linearly from 0 to a peak, and then falls linearly to the lowest rate."""

    def __init__(self, peak: Any, total_steps: int, warmup_proportion: float, min_lr: float) -> None:
        self.peak, self.total_steps = peak, check_total_steps(total_steps)
        self.warmup_proportion = check_setting("warmup_proportion", warmup_proportion)
        self.min_lr = check_setting("min_lr", min_lr)
        check_warm_up(self.total_steps, self.min_lr, peak)

    def __call__(self, step: Any) -> Any:
        is_schedule = isinstance(self.peak, keras.optimizers.schedules.LearningRateSchedule)
        peak = self.peak(step) if is_schedule else self.peak() if callable(self.peak) else self.peak
        step = ops.cast(step, "float32") + 1.0
        rising = self.total_steps * self.warmup_proportion
        falling = max(self.total_steps - rising, 1.0)
        fallen = (self.min_lr - peak) * ops.minimum(step - rising, falling) / falling
        return ops.where(step <= rising, peak * step / max(rising, 1e-30), peak + fallen)

    def get_config(self) -> dict[str, Any]:
        """Return the settings by their names in `RectifiedAdam`."""
        return {
            "learning_rate": keras.saving.serialize_keras_object(self.peak),
            "total_steps": self.total_steps,
            "warmup_proportion": self.warmup_proportion,
            "min_lr": self.min_lr,
        }
