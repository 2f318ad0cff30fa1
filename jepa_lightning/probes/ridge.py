"""Probes of the pendulum's state on embeddings: ridge regression in closed form, and a small MLP.

Shapes: N samples, D embedding dimension, L labels.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jepa_lightning.metrics import RidgeR2
from jepa_lightning.networks.mlp import mlp

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def mean_and_scale(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column of (N, D): two tensors (D,).

    The scale of a column that never varies is 1: divided by its own, a small error of a forecast would become a huge one.
    """
    std = values.std(dim=0)
    return values.mean(dim=0), torch.where(std > 1e-6, std, 1.0)


class LinearReadout(nn.Module):
    """Ridge probe: an affine map, fitted in float64 with the penalty that does best on validation samples.

    Args:
        dim: Embedding dimension D.
        num_labels: Number of labels L.
    """

    weights: Tensor

    def __init__(self, dim: int, num_labels: int) -> None:
        super().__init__()
        self.register_buffer("weights", torch.zeros(1 + dim, num_labels))

    @torch.no_grad()
    def fit(self, features: Tensor, labels: Tensor, val_features: Tensor, val_labels: Tensor) -> float:
        """Fit on (N, D) and (N, L), choose the penalty on validation samples, and return it."""
        moments = RidgeR2(features.shape[1], labels.shape[1]).to(features.device)
        moments.update(features, labels, fit=True)
        moments.update(val_features, val_labels, fit=False)
        best = max(RIDGES, key=lambda ridge: moments.r2(moments.weights(ridge)).mean().item())
        self.weights.copy_(moments.weights(best))
        return best

    def forward(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., L)."""
        return self.weights[0] + features @ self.weights[1:]


class MLPReadout(nn.Module):
    """MLP probe: a small MLP between standardized embeddings and standardized labels.

    Args:
        dim: Embedding dimension D.
        num_labels: Number of labels L.
        hidden_dim: Width of the two hidden layers.
    """

    feature_mean: Tensor
    feature_scale: Tensor
    label_mean: Tensor
    label_scale: Tensor

    def __init__(self, dim: int, num_labels: int, hidden_dim: int) -> None:
        super().__init__()
        self.net = mlp(dim, (hidden_dim, hidden_dim), num_labels)
        for name, size in (("feature", dim), ("label", num_labels)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_scale", torch.ones(size))

    def fit(self, features: Tensor, labels: Tensor, num_steps: int, learning_rate: float, batch_size: int = 512) -> None:
        """Fit by AdamW on random batches of (N, D) and (N, L)."""
        for name, values in (("feature", features), ("label", labels)):
            mean, scale = mean_and_scale(values)
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_scale").copy_(scale)

        def loss(generator: torch.Generator) -> Tensor:
            rows = torch.randint(len(features), (batch_size,), generator=generator).to(features.device)
            error = self(features[rows]) - labels[rows]
            return (error / self.label_scale).square().mean()

        minimize(loss, self.net.parameters(), num_steps, learning_rate)

    def forward(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., L)."""
        return self.label_mean + self.label_scale * self.net((features - self.feature_mean) / self.feature_scale)


def fit_predictor(
    predictor: nn.Module,
    unroll: Callable[[nn.Module, Tensor, int], Tensor],
    features: Tensor,
    horizon: int,
    num_steps: int,
    learning_rate: float,
    batch_size: int = 256,
) -> None:
    """Train a predictor on the dynamics of frozen embeddings, with the prediction loss of a JEPA.

    Args:
        predictor: Predictor of the embedding one frame later, (..., D) -> (..., D).
        unroll: Roll-out function: predictor, embeddings (N, D) and H -> (N, H, D).
        features: Embeddings of a sequence, (N, T, D) with T > H.
        horizon: Number of prediction steps H in the loss.
        num_steps: Number of optimizer steps.
        learning_rate: Peak learning rate.
        batch_size: Number of roll-outs per step.
    """
    last_start = features.shape[1] - horizon
    if last_start < 1:
        raise ValueError(f"Training clips of {features.shape[1]} windows are too short for a horizon of {horizon} steps.")

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(features), (batch_size, 1), generator=generator).to(features.device)
        starts = torch.randint(last_start, (batch_size, 1), generator=generator).to(features.device)
        clips = features[rows, starts + torch.arange(horizon + 1, device=features.device)]  # (N, 1 + H, D)
        return F.mse_loss(unroll(predictor, clips[:, 0], horizon), clips[:, 1:])

    minimize(loss, predictor.parameters(), num_steps, learning_rate)


def minimize(
    loss: Callable[[torch.Generator], Tensor], parameters: Iterable[nn.Parameter], num_steps: int, learning_rate: float
) -> None:
    """AdamW with a one-cycle learning rate. Batches are drawn from a generator of their own: same call, same result."""
    parameters = list(parameters)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_steps)
    with torch.enable_grad():
        for _ in range(num_steps):
            optimizer.zero_grad()
            loss(generator).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            schedule.step()
