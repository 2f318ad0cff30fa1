"""Weight decay that changes during training."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from callbacks.schedules import cosine, total_optimizer_steps
from callbacks.steps import StepFollower


class WeightDecaySchedule(StepFollower):
    """Set the weight decay of the parameter groups named "decay" on a cosine over the optimizer steps.

    Groups of any other name (biases, norms, position tables) keep what they have. The value is set before each batch as
    a function of the steps that happened, see `StepFollower`, hence unharmed by accumulation, by a resume and by steps that
    a gradient scaler leaves out, and in time for `LearningRateMonitor`.

    Args:
        start: Weight decay at the first optimizer step, >= 0.
        end: Weight decay at the last optimizer step, >= 0.
        offset: Number of the step whose value the first optimizer step takes; the released I-JEPA counts from 1.

    Raises:
        ValueError: A negative weight decay.
    """

    def __init__(self, start: float, end: float, offset: int = 0) -> None:
        if start < 0 or end < 0:
            raise ValueError(f"weight decay from {start} to {end}: both must be >= 0.")
        self.start, self.end, self.offset = start, end, offset

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._total = total_optimizer_steps(trainer)
        if not any(group.get("name") == "decay" for optimizer in trainer.optimizers for group in optimizer.param_groups):
            raise ValueError(
                "WeightDecaySchedule found no parameter group named 'decay'. Build the groups with "
                "jepa_lightning.optim.parameter_groups."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        value = cosine(self.steps + self.offset, self._total, self.start, self.end)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if group.get("name") == "decay":
                    group["weight_decay"] = value
