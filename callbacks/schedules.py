"""Schedules as pure functions of the optimizer step: momentum, learning rate and weight decay share them.

Every function returns a plain Python float, takes the step first and holds its end value after `total` steps, so a
resumed run needs no saved state to continue the curve.
"""

import math
from typing import Literal

from lightning.pytorch import Trainer

ScheduleName = Literal["cosine", "linear", "constant"]
MomentumSchedule = Literal["cosine", "linear", "constant", "loss"]
"""Those of a momentum, which may also follow the prediction loss: see `callbacks.ema.EMAUpdate`."""


def _progress(step: int, total: int) -> float:
    if step < 0:
        raise ValueError(f"step={step}: a schedule starts at optimizer step 0.")
    if total <= 0:
        raise ValueError(f"total={total}: a schedule needs at least one optimizer step.")
    return min(1.0, step / total)


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `total`."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * _progress(step, total)))


def linear(step: int, total: int, start: float, end: float) -> float:
    """A straight line from `start` at step 0 to `end` at step `total`, as the released I-JEPA code moves its momentum."""
    return start + (end - start) * _progress(step, total)


def constant(step: int, total: int, start: float, end: float) -> float:
    """`start`, always. `end` is there so that the schedules can stand in for each other and must equal `start`."""
    if end != start:
        raise ValueError(f"A constant schedule cannot go from {start} to {end}: set both to the same value.")
    _progress(step, total)
    return start


SCHEDULES = {"cosine": cosine, "linear": linear, "constant": constant}


def warmup_cosine(step: int, total: int, warmup: int, start: float = 0.0, end: float = 0.0) -> float:
    """Multiplier of the peak learning rate: a line from `start` to 1 over `warmup` steps, then a cosine to `end`.

    Raises:
        ValueError: A warm-up that does not end before training does.
    """
    if not 0 <= warmup < total:
        raise ValueError(
            f"warmup={warmup} of total={total} optimizer steps: the warm-up must end before training does. "
            "Shorten the warm-up or train longer."
        )
    if step < warmup:
        return linear(step, warmup, start, 1.0)
    return cosine(step - warmup, total - warmup, 1.0, end)


def late_rise(step: int, total: int, start_fraction: float, length: float = 0.1) -> float:
    """Multiplier of a weight: 0 until a fraction of all steps, then a line to 1, which it reaches `length` later."""
    return min(1.0, max(0.0, (_progress(step, total) - start_fraction) / length))


def total_optimizer_steps(trainer: Trainer) -> int:
    """How many optimizer steps `trainer.fit` will take, from whichever of max_steps and max_epochs is set.

    Raises:
        ValueError: Training without an end, over which no schedule can be laid.
    """
    total = trainer.estimated_stepping_batches
    if math.isinf(total) or total <= 0:
        raise ValueError(
            f"This training run would take {total} optimizer steps, and the schedules need a positive, finite number. "
            "Set trainer.max_epochs or trainer.max_steps (an iterable data set without a length needs max_steps)."
        )
    return int(total)
