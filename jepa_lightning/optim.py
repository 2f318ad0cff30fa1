"""Parameter groups, gradient norms and the learning-rate schedule."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from callbacks.schedules import warmup_cosine


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into "decay" (matrices and kernels) and "no_decay" (biases, norms, mask tokens).

    Frozen parameters, the target encoder's among them, are left out. The names of the groups are what
    `callbacks.WeightDecaySchedule` and the learning-rate monitor go by.
    """
    groups: list[dict[str, Any]] = [
        {"name": "decay", "params": [], "weight_decay": weight_decay},
        {"name": "no_decay", "params": [], "weight_decay": 0.0},
    ]
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                groups[parameter.ndim <= 1 or name.endswith("_token")]["params"].append(parameter)
    return groups


def fused_is_safe(trainer: Trainer) -> bool:
    """Whether AdamW may run as one kernel: on CUDA, unless something must see the gradients before it.

    A fused optimizer unscales gradients itself and decides on the device whether to leave a step out, so nobody on the
    host would know of it; and for the same reason Lightning refuses to clip its gradients under any mixed precision.
    """
    mixed = isinstance(trainer.precision_plugin, MixedPrecision)
    scaled = mixed and trainer.precision_plugin.scaler is not None
    return trainer.strategy.root_device.type == "cuda" and not scaled and not (mixed and trainer.gradient_clip_val)


def leave_alone(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Have AdamW leave parameters out of its next step, which they come into later with nothing remembered.

    It leaves out what has no gradient. Zeros would be taken for gradients that vary little, and weights would decay. The
    state that it makes at a parameter's first step is made here: a sharded checkpoint is only read where all have one.
    """
    fused = bool(optimizer.defaults["fused"])
    for parameter in parameters:
        parameter.grad = None
        if not optimizer.state[parameter]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device if fused else "cpu"),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together: a scalar on their device, that of the whole network if it is sharded.

    Sharded gradients make this a collective call: all processes take part, or they wait for each other forever.
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class StepSchedule(LambdaLR):
    """A learning rate as a function of the optimizer steps that happened.

    A gradient scaler (`precision: 16-mixed`) leaves out a step whose gradients are not finite; Lightning steps the
    schedule all the same, and this one then stays where it is. A checkpoint that was written between the optimizer's step
    and the schedule's is made up for when it is loaded.

    Args:
        optimizer: Optimizer that holds the peak learning rates.
        factor: Function from the number of a step, counted from 0, to the multiplier of the peak.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float]) -> None:
        self.stepped = True  # LambdaLR takes the first value in its constructor, by a step of its own
        super().__init__(optimizer, factor)
        optimizer.register_step_post_hook(self._note)

    def _note(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.stepped = True

    def step(self, epoch: int | None = None) -> None:
        """Go on to the next value, if the optimizer has stepped since the last call."""
        if self.stepped:
            self.stepped = False
            super().step(epoch)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position; a state without `stepped` is taken to be complete."""
        super().load_state_dict({"stepped": False} | state_dict)
        self.step()


def warmup_cosine_schedule(
    optimizer: Optimizer,
    total_steps: int,
    warmup_fraction: float,
    start: float = 0.01,
    end: float = 0.0,
    offset: int = 0,
) -> dict[str, Any]:
    """The learning rate of every optimizer step, in the form that Lightning's `configure_optimizers` returns.

    Args:
        optimizer: Optimizer that holds the peak learning rates.
        total_steps: Number of optimizer steps of the whole training.
        warmup_fraction: Fraction of `total_steps` over which the learning rate rises, in [0, 1).
        start: Learning rate at the start of the warm-up, as a fraction of the peak.
        end: Learning rate at the end of the cosine decay, as a fraction of the peak.
        offset: Number of the step whose value the first optimizer step takes; 1 as in the released I-JEPA, or 0.
    """
    warmup = int(warmup_fraction * total_steps)

    def factor(step: int) -> float:
        return warmup_cosine(step + offset, total_steps, warmup, start, end)

    return {"scheduler": StepSchedule(optimizer, factor), "interval": "step"}
