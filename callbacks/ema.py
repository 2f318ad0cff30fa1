"""The target encoder follows the context encoder: one exponential-moving-average update per optimizer step."""

from collections.abc import Callable
from typing import Any, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from callbacks.schedules import SCHEDULES, MomentumSchedule, total_optimizer_steps
from callbacks.steps import StepFollower

TARGET = "target_encoder"
"""Name of the averaged network in a module, and in its checkpoints."""


SMOOTHED_STEPS = 100
"""Optimizer steps over which the loss is smoothed before the momentum follows it."""


class EMAUpdate(StepFollower):
    """target <- momentum * target + (1 - momentum) * context, exactly once per optimizer step and right after it.

    The momentum is a function of the optimizer steps that happened, see `StepFollower`, so a resumed run continues the
    curve, also from a checkpoint that was written before the update of its step.

    The average is kept in float32. Where the networks are narrower (`precision: bf16-true` or `16-true`), the target
    encoder holds its rounded value, because a narrow number cannot take up the small steps: bfloat16 stands still at a
    momentum of 0.996. Checkpoints hold the average itself, under the target encoder's names.

    Differs from the paper: I-JEPA raises the momentum linearly; the default here is a cosine. Choose
    `schedule: linear` for parity.

    With `schedule: loss` the momentum follows the prediction loss instead of the steps: it is `start` where the loss,
    smoothed over some hundred steps, is the largest so far, and comes the nearer to `end` the smaller the loss is, in
    proportion. While predictions are poor, targets follow fast; as they become good, targets stand still. The module's
    `step_loss` is read for it, averaged over the processes, which waits for the device once in each step.

    Args:
        start: Momentum of the first update, in [0, 1].
        end: Momentum that the schedule approaches at the end of training, in [start, 1].
        schedule: Shape of the way from `start` to `end`, or "loss".

    Raises:
        ValueError: Momenta out of range, or a constant schedule between two different values.
    """

    _note_loss: Callable[[], Any] | None = None
    _average: dict[str, Tensor] | None = None  # in float32, by name, where the target encoder itself is narrower

    def __init__(self, start: float = 0.996, end: float = 1.0, schedule: MomentumSchedule = "cosine") -> None:
        if not 0.0 <= start <= end <= 1.0:
            raise ValueError(f"momentum from {start} to {end}: choose 0 <= start <= end <= 1.")
        if schedule not in get_args(MomentumSchedule):
            raise ValueError(f"schedule={schedule!r}: choose one of {', '.join(get_args(MomentumSchedule))}.")
        if schedule != "loss":
            SCHEDULES[schedule](0, 1, start, end)  # a constant schedule checks its ends
        self.start, self.end, self.schedule = start, end, schedule
        self._loss: Tensor | None = None  # of the step that is to be followed
        self._smoothed = self._largest = 0.0  # loss, for the schedule that follows it
        self._loaded: dict[str, Tensor] = {}

    def momentum(self, step: int, total: int) -> float:
        """Momentum of the update that follows optimizer step number `step`, counted from 0."""
        if self.schedule == "loss":
            return self.end - (self.end - self.start) * self._smoothed / (self._largest or 1.0)
        return SCHEDULES[self.schedule](step, total, self.start, self.end)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._loaded = {}
        if trainer.global_step == 0:
            self._average, self._loss, self._smoothed, self._largest = None, None, 0.0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._total, by_loss = total_optimizer_steps(trainer), self.schedule == "loss"
        target = getattr(pl_module, TARGET)
        if self._average is None or self._loaded:
            self._average = wide_copy(target, self._loaded)
        self._loaded = {}
        self._note_loss = (lambda: trainer.strategy.reduce(pl_module.step_loss, reduce_op="mean")) if by_loss else None
        super().on_train_start(trainer, pl_module)

    def _note(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        super()._note(optimizer, args, kwargs)
        if self._note_loss is not None:
            self._loss = self._note_loss()

    def state_dict(self) -> dict[str, Any]:
        loss = None if self._loss is None else float(self._loss)
        return super().state_dict() | {"loss": loss, "smoothed": self._smoothed, "largest": self._largest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        loss = state_dict.get("loss")
        self._loss = None if loss is None else torch.tensor(loss)
        self._smoothed, self._largest = state_dict.get("smoothed", 0.0), state_dict.get("largest", 0.0)

    def _follow_loss(self) -> None:
        """Take the loss of a step into its running average."""
        if self.schedule == "loss" and self._loss is not None:
            loss = float(self._loss)
            self._smoothed = loss if self.steps == 1 else self._smoothed + (loss - self._smoothed) / SMOOTHED_STEPS
            self._largest = max(self._largest, self._smoothed)

    def on_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._follow_loss()
        momentum = self.momentum(self.steps - 1, self._total)
        update_average(getattr(pl_module, TARGET), pl_module.context_encoder, momentum, self._average)
        # Filled on the device: a number from the host would have to be waited for.
        pl_module.log("train/momentum", torch.full((), momentum, device=pl_module.device))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the float32 average in the place of its rounded value."""
        for name, value in (self._average or {}).items():
            checkpoint["state_dict"][f"{TARGET}.{name}"] = value.clone()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the float32 average, which loading into a narrow network rounds."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        prefix = f"{TARGET}."
        weights = checkpoint.get("state_dict", {})  # a sharded checkpoint is not in memory, and its networks are not narrow
        self._loaded = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def wide_copy(network: torch.nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The parameters of a network in float32 by name, from `values` where they have them; None if they are that wide."""
    parameters = dict(network.named_parameters())
    if all(parameter.dtype.itemsize >= torch.float32.itemsize for parameter in parameters.values()):
        return None
    return {
        name: values.get(name, parameter).detach().to(parameter.device, torch.float32, copy=True)
        for name, parameter in parameters.items()
    }


@torch.no_grad()
def update_average(
    target: torch.nn.Module, context: torch.nn.Module, momentum: float, average: dict[str, Tensor] | None = None
) -> None:
    """Move the parameters of `target` towards those of `context`, fused over tensors; copy the buffers.

    Of sharded networks, each process moves its own shards, without a word to the others. Buffers are running statistics or
    fixed tables, and the former are averages already.

    Args:
        target: Network whose parameters are averages.
        context: Network of the same shape, sharded alike.
        momentum: Weight of the old average, in [0, 1].
        average: Parameters of `target` by name, of higher precision: these are moved, and `target` takes what they round
            to.
    """
    targets, contexts = ([local(p) for p in network.parameters()] for network in (target, context))
    if average is None:
        get_ema_multi_avg_fn(momentum)(targets, contexts, None)
    else:
        wide = list(average.values())
        get_ema_multi_avg_fn(momentum)(wide, [value.to(torch.float32) for value in contexts], None)
        torch._foreach_copy_(targets, wide)
    for target_buffer, context_buffer in zip(target.buffers(), context.buffers(), strict=True):
        local(target_buffer).copy_(local(context_buffer))


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its shard if it is sharded, otherwise all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
