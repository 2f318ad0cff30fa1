"""What probes read out of the features of a pendulum."""

import torch
from torch import Tensor

LABELS = ("sin_theta1", "cos_theta1", "sin_theta2", "cos_theta2", "omega1", "omega2")


def state_labels(states: Tensor) -> Tensor:
    """What probes read out: sine and cosine of both angles, and both angular velocities, (..., 4) -> (..., 6)."""
    theta1, theta2, omega1, omega2 = states.unbind(-1)
    return torch.stack([theta1.sin(), theta1.cos(), theta2.sin(), theta2.cos(), omega1, omega2], dim=-1)
