"""Parameter groups and the learning-rate schedule."""

from collections.abc import Iterable
from typing import Any

from torch import nn
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
        optimizer: Holds the peak learning rates.
        total_steps: Optimizer steps of the whole training.
        warmup_fraction: Part of them, in [0, 1), over which the rate rises.
        start: From where it rises, as a fraction of the peak.
        end: Where the cosine ends, as a fraction of the peak.
        offset: The first optimizer step takes the value of this one; the released I-JEPA counts from 1.
    """
    warmup = int(warmup_fraction * total_steps)

    def factor(step: int) -> float:
        return warmup_cosine(step + offset, total_steps, warmup, start, end)

    return {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
