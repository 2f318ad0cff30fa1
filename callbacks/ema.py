"""The target encoder follows the context encoder: one exponential-moving-average update per optimizer step."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from callbacks.schedules import SCHEDULES, ScheduleName, total_optimizer_steps


class EMAUpdate(Callback):
    """target <- momentum * target + (1 - momentum) * context, exactly once per optimizer step and right after it.

    It acts in `on_train_batch_end` and only when `trainer.global_step` has moved, so gradient accumulation causes no
    extra update, and a callback's hook runs before `ModelCheckpoint` writes the file (a module's would run after).
    `on_before_zero_grad`, often used for this, is one step late and misses the last step. There is no state to save:
    the momentum is a function of the step alone, so a resumed run continues the curve.

    Differs from the paper: I-JEPA raises the momentum linearly; the default here is a cosine. Choose
    `schedule: linear` for parity.

    Args:
        start: Momentum of the first update, in [0, 1].
        end: Momentum that the schedule approaches at the end of training, in [start, 1].
        schedule: Shape of the way from `start` to `end`.

    Raises:
        ValueError: Momenta out of range, or a constant schedule between two different values.
    """

    def __init__(self, start: float = 0.996, end: float = 1.0, schedule: ScheduleName = "cosine") -> None:
        if not 0.0 <= start <= end <= 1.0:
            raise ValueError(f"momentum from {start} to {end}: choose 0 <= start <= end <= 1.")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r}: choose one of {', '.join(SCHEDULES)}.")
        SCHEDULES[schedule](0, 1, start, end)  # a constant schedule checks its ends
        self.start, self.end, self.schedule = start, end, schedule

    def momentum(self, step: int, total: int) -> float:
        """Momentum of the update that follows optimizer step number `step`, counted from 0."""
        return SCHEDULES[self.schedule](step, total, self.start, self.end)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._total = total_optimizer_steps(trainer)
        self._seen_step = trainer.global_step  # training state is already restored here, also after a resume

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._seen_step:
            return
        self._seen_step = trainer.global_step
        momentum = self.momentum(trainer.global_step - 1, self._total)
        update_average(pl_module.target_encoder, pl_module.context_encoder, momentum)
        pl_module.log("train/momentum", momentum)


@torch.no_grad()
def update_average(target: torch.nn.Module, context: torch.nn.Module, momentum: float) -> None:
    """Move the parameters of `target` towards those of `context`, fused over tensors; copy the buffers.

    Buffers are running statistics or fixed tables, and the former are averages already.
    """
    get_ema_multi_avg_fn(momentum)(list(target.parameters()), list(context.parameters()), None)
    for target_buffer, context_buffer in zip(target.buffers(), context.buffers(), strict=True):
        target_buffer.copy_(context_buffer)
