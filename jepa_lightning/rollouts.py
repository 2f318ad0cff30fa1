"""Roll-outs: a predictor applied to its own output, and what it should have said.

Shapes: B batch, T windows in time, H horizon, D width, A scalars of an action.
"""

import torch
from torch import Tensor, nn


def unroll(predictor: nn.Module, features: Tensor, horizon: int, actions: Tensor | None = None) -> Tensor:
    """Apply the predictor to its own output, again and again.

    Args:
        predictor: Features one step later: (..., D), and (..., A) if something acts -> (..., D).
        features: (..., D) to start from.
        horizon: H steps.
        actions: (..., H, A), the first acting on `features`; None of a free pendulum.

    Returns:
        (..., H, D), the features 1 ... H steps later.
    """
    steps = []
    for step in range(horizon):
        features = predictor(features) if actions is None else predictor(features, actions[..., step, :])
        steps.append(features)
    return torch.stack(steps, dim=-2)


def later_features(features: Tensor, horizon: int) -> Tensor:
    """For every start that has H successors, these successors: (B, T, D) -> (B, T - H, H, D)."""
    return features.unfold(1, horizon + 1, 1)[..., 1:].transpose(2, 3)  # unfold: (B, T - H, D, H + 1)


def next_actions(actions: Tensor | None, horizon: int) -> Tensor | None:
    """For every start that has H successors, the actions on the way: (B, T - 1, A) -> (B, T - H, H, A)."""
    return None if actions is None else actions.unfold(1, horizon, 1).transpose(2, 3)
