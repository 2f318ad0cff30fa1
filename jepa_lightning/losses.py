"""How far predicted features are from target features."""

import torch
from torch import Tensor
from torch.nn import functional as F


def prediction_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error between predicted and target features, averaged over everything.

    Args:
        predictions: (..., D).
        targets: (..., D), without gradient.

    Returns:
        Scalar.
    """
    assert not targets.requires_grad, "the targets of a JEPA carry no gradient"
    return F.mse_loss(predictions, targets)


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


def check_finite(loss: Tensor, step: int) -> None:
    """Stop before a NaN reaches the weights.

    This waits for the device once per batch, which costs a fraction of a millisecond; in return no checkpoint holds
    weights that went through a NaN loss.

    Args:
        loss: Scalar.
        step: Optimizer step that would follow, for the message.

    Raises:
        NonFiniteLossError: The loss is NaN or infinite.
    """
    if not torch.isfinite(loss):
        raise NonFiniteLossError(
            f"The loss is {loss.item()} at optimizer step {step}; training stopped before the weights took part in it. "
            "The last checkpoint is good. Lower model.learning_rate, set trainer.gradient_clip_val, or train in a "
            "wider precision, then resume with --ckpt_path last."
        )
