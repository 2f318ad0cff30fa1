"""What keeps features from collapsing: terms on the context encoder's output, where they have a gradient.

Placed on the EMA targets they would be constants, and placed on predictions they shape the predictor alone.
Statistics are taken in float32 over all samples of all processes. Shapes: B samples, T times, D width.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RegularizerName = Literal["variance_hinge", "vicreg"]


def variance_hinge(features: Tensor) -> Tensor:
    """Mean over dimensions of ReLU(1 - std): zero as soon as each feature has a standard deviation of 1.

    Args:
        features: (N, D), N >= 2.

    Returns:
        Scalar. The 1e-4 inside the root keeps the gradient finite and alive in a collapsed dimension.
    """
    return F.relu(1 - (features.var(dim=0) + 1e-4).sqrt()).mean()


def covariance_penalty(features: Tensor) -> Tensor:
    """Sum of squared off-diagonal covariances, divided by D (Bardes et al. 2022, equation 4).

    Other code averages over the D (D - 1) entries; a weight of w here is w (D - 1) there.

    Args:
        features: (N, D), N >= 2.

    Returns:
        Scalar.
    """
    centred = features - features.mean(dim=0)
    covariance = centred.T @ centred / (len(features) - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / features.shape[1]


def curvature(features: Tensor) -> Tensor:
    """Mean squared second difference in time: how far the features are from moving along straight lines.

    Among all sets of features that carry the state, it prefers those that change slowly and smoothly: sines and cosines
    of the angles themselves rather than of their multiples, which is what makes the state linear in the features.

    Args:
        features: (B, T, D).

    Returns:
        Scalar; zero if T < 3.
    """
    if features.shape[1] < 3:
        return features.new_zeros(())
    return (features[:, 2:] - 2 * features[:, 1:-1] + features[:, :-2]).square().mean()


TERMS = {"variance_hinge": ("std",), "vicreg": ("std", "cov", "curvature")}
DEFAULT_WEIGHTS = {"variance_hinge": {"std": 0.1}, "vicreg": {"std": 1.0, "cov": 0.05, "curvature": 1.0}}


class Regularizer(nn.Module):
    """A weighted sum of terms over the encoded sequence.

    "variance_hinge" is the recipe of the first pendulum JEPA, 0.1 * ReLU(1 - std). "vicreg" is VICReg (Bardes et al.
    2022) over several times of the sequence, with weights per term: `std` (the hinge), `cov` (covariance, divided by D)
    and `curvature` (second difference in time). VICReg itself has no such third term: it compares two views instead.

    Args:
        name: "variance_hinge" or "vicreg".
        weights: Weight of each term, >= 0; terms left out keep their default.

    Raises:
        ValueError: An unknown name or term, or a negative weight.
    """

    def __init__(self, name: RegularizerName, weights: dict[str, float] | None = None) -> None:
        super().__init__()
        if name not in TERMS:
            raise ValueError(f"model.regularizer={name!r}: choose one of {', '.join(TERMS)}.")
        for term, weight in (weights or {}).items():
            if term not in TERMS[name]:
                raise ValueError(
                    f"model.regularizer_weights names {term!r}: regularizer {name!r} has {', '.join(TERMS[name])}."
                )
            if not weight >= 0:
                raise ValueError(f"model.regularizer_weights: {term}={weight} must be >= 0.")
        self.weights = DEFAULT_WEIGHTS[name] | (weights or {})

    def forward(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum and the unweighted terms.

        Args:
            features: (B, T, D) from the context encoder, of all processes.
        """
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            flat = features.flatten(0, 1)  # (B * T, D)
            terms = {"std": variance_hinge(flat)}
            if "cov" in self.weights:
                terms["cov"] = covariance_penalty(flat)
                terms["curvature"] = curvature(features)
            total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return total, terms
