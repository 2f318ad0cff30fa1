"""Roll-outs in latent space: a predictor applied to its own output, its targets, and its errors.

Shapes: B batch, T windows in time, H horizon, D embedding dimension, A scalars of an action.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from jepa_lightning.metrics import ErrorOverMean
from jepa_lightning.networks.predictor import PrefixPredictor
from jepa_lightning.wide import WideMean


def unroll(predictor: nn.Module, features: Tensor, horizon: int, actions: Tensor | None = None) -> Tensor:
    """Roll out the predictor: apply it to its own output, autoregressively, unless it has a way of its own.

    Args:
        predictor: Predictor of the embedding one step later: (..., D), and (..., A) if action-conditioned -> (..., D); or
            a `PrefixPredictor`, which predicts several steps at once.
        features: Embeddings to start from, (..., D).
        horizon: Number of steps H.
        actions: Actions, (..., H, A), the first acting on `features`; None for a free pendulum.

    Returns:
        (..., H, D), the embeddings 1 ... H steps later.
    """
    if isinstance(predictor, PrefixPredictor):
        return predictor.unroll(features, horizon, actions)
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


class ForecastErrors(nn.Module):
    """Squared errors of forecasts one and H steps ahead, compared with persistence (no change) and with other actions.

    Args:
        acted: Whether the pendulum is actuated.
        dim: Embedding dimension D.
    """

    def __init__(self, acted: bool, dim: int) -> None:
        super().__init__()
        self.over_mean = ErrorOverMean(dim)
        self.acted = acted
        others = ("shuffled", "zero") if acted else ()
        self.errors = nn.ModuleDict({name: WideMean() for name in ("first", "last", "first_still", "last_still", *others)})

    def update(
        self, forecast: Callable[[Tensor, Tensor | None], Tensor], starts: Tensor, targets: Tensor, actions: Tensor | None
    ) -> None:
        """Evaluate forecasts.

        Args:
            forecast: Function from starts and actions to forecasts, (B, S, H, D).
            starts: Embeddings to start from, (B, S, D).
            targets: Embeddings that follow, (B, S, H, D).
            actions: Actions, (B, S, H, A); None for a free pendulum.
        """
        forecasts = forecast(starts, actions)
        error = forecasts - targets
        change = starts[:, :, None] - targets
        for name, step in (("first", 0), ("last", -1)):
            self.errors[name].update(error[:, :, step].square().mean())
            self.errors[f"{name}_still"].update(change[:, :, step].square().mean())
        self.over_mean.update(forecasts[:, :, -1], targets[:, :, -1])
        if actions is not None and len(actions) > 1:  # those of another trajectory, and none
            for name, others in (("shuffled", actions.roll(1, dims=0)), ("zero", torch.zeros_like(actions))):
                self.errors[name].update((forecast(starts, others) - targets)[:, :, -1].square().mean())

    def compute(self) -> dict[str, Tensor]:
        """Ratios by name, and start anew.

        persistence_ratio, persistence_ratio_first: over the error of predicting no change, at the last and first step.
        normalized_error: over the error of predicting the mean of all targets, at the last step. Of embeddings that have
            become noise, predicting no change has twice that error, and a constant beats it.
        shuffled_over_true, zero_over_true: error under other actions over that under the true ones, at the last step.
        """
        errors = {name: metric.compute() for name, metric in self.errors.items() if metric.update_called}
        for metric in self.errors.values():
            metric.reset()
        ratios = {
            "persistence_ratio_first": errors["first"] / errors["first_still"],
            "persistence_ratio": errors["last"] / errors["last_still"],
            "normalized_error": self.over_mean.compute(),
        }
        self.over_mean.reset()
        for name in {"shuffled", "zero"} & errors.keys():
            ratios[f"{name}_over_true"] = errors[name] / errors["last"]
        return ratios
