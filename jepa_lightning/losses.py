"""How far predicted embeddings are from target embeddings, which carry no gradient (stop-gradient)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def squared_error(predictions: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error between predicted and target embeddings, averaged over everything.

    Args:
        predictions: Predicted embeddings, (..., H, D).
        targets: Target embeddings, (..., H, D), without gradient.
        weights: Weights of the prediction steps, (H,), with a mean of 1; all alike by default.

    Returns:
        Scalar.
    """
    assert not targets.requires_grad, "the targets of a JEPA carry no gradient"
    if weights is None:
        return F.mse_loss(predictions, targets)
    return (F.mse_loss(predictions, targets, reduction="none").mean(dim=-1) * weights).mean()


def smooth_l1(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean Huber loss with its corner at 1, as the released I-JEPA code has it: (..., D) twice -> scalar."""
    assert not targets.requires_grad, "the targets of a JEPA carry no gradient"
    return F.smooth_l1_loss(predictions, targets)


def step_weights(horizon: int, decay: float) -> Tensor:
    """Weights proportional to k ** -decay for the steps k = 1 ... H, with a mean of 1: (H,)."""
    weights = torch.arange(1, horizon + 1, dtype=torch.float32) ** -decay
    return weights / weights.mean()
