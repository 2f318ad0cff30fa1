"""Anti-collapse regularizers: terms on the context encoder's output, where they have a gradient.

Placed on the EMA targets they would be constants, and placed on predictions they shape the predictor alone.
Statistics are taken in float32 over all samples of all processes. Shapes: B samples, T times, D embedding dimension,
P projections.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RegularizerName = Literal["variance_hinge", "vicreg", "barlow_twins", "sigreg", "subspace_sigreg", "dino_centering"]

CENTER_MOMENTUM = 0.9
"""EMA momentum of the center of `dino_centering`, as in Caron et al. 2021."""

NUM_PROJECTIONS = 256
"""Directions along which `sigreg` tests the embeddings, new ones each optimizer step."""

NUM_SUBSPACES = 8
"""Subspaces that the directions of `subspace_sigreg` stay in."""


def variance_hinge(features: Tensor) -> Tensor:
    """Mean over dimensions of ReLU(1 - std): zero as soon as each dimension has a standard deviation of 1.

    Args:
        features: Embeddings, (N, D), N >= 2.

    Returns:
        Scalar. The 1e-4 inside the root keeps the gradient finite and alive in a collapsed dimension.
    """
    return F.relu(1 - (features.var(dim=0) + 1e-4).sqrt()).mean()


def covariance_penalty(features: Tensor) -> Tensor:
    """Sum of squared off-diagonal covariances, divided by D (Bardes et al. 2022, equation 4).

    Other code averages over the D (D - 1) entries; a weight of w here is w (D - 1) there.

    Args:
        features: Embeddings, (N, D), N >= 2.

    Returns:
        Scalar.
    """
    centered = features - features.mean(dim=0)
    covariance = centered.T @ centered / (len(features) - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / features.shape[1]


def curvature(features: Tensor) -> Tensor:
    """Mean squared second difference in time: how far the embeddings are from moving along straight lines.

    Among all sets of embeddings that carry the state, it prefers those that change slowly and smoothly: sines and cosines
    of the angles themselves rather than of their multiples, which is what makes the state linear in the embeddings.

    Args:
        features: Embeddings of a sequence, (B, T, D).

    Returns:
        Scalar; zero if T < 3.
    """
    if features.shape[1] < 3:
        return features.new_zeros(())
    return (features[:, 2:] - 2 * features[:, 1:-1] + features[:, :-2]).square().mean()


def similarity_in_time(features: Tensor) -> Tensor:
    """Temporal similarity: mean squared difference of consecutive embeddings, VICReg's invariance between times.

    Args:
        features: Embeddings of a sequence, (B, T, D).

    Returns:
        Scalar; zero if T < 2.
    """
    if features.shape[1] < 2:
        return features.new_zeros(())
    return features.diff(dim=1).square().mean()


def cross_correlation_penalties(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Barlow Twins (Zbontar et al. 2021, equation 1) divided by D: how far the cross-correlation is from the identity.

    It knows nothing of the embeddings' scale: a prediction loss may shrink them as long as they stay above 0.01.

    Args:
        first: Embeddings, (N, D), N >= 2.
        second: Embeddings of other views of the same samples, (N, D).

    Returns:
        Mean of (1 - C_ii)^2, and sum of C_ij^2 off the diagonal over D.
    """
    units = [(z - z.mean(dim=0)) / (z.var(dim=0, unbiased=False) + 1e-4).sqrt() for z in (first, second)]
    correlation = units[0].T @ units[1] / len(first)
    diagonal = correlation.diagonal()
    return (1 - diagonal).square().mean(), (correlation.square().sum() - diagonal.square().sum()) / len(diagonal)


def gaussian_distance(features: Tensor, projections: Tensor) -> Tensor:
    """How far the embeddings are from a standard normal distribution, seen along lines (SIGReg, Balestriero & LeCun 2025).

    Along each line, the squared distance of the empirical characteristic function from exp(-t^2 / 2), under the weight
    exp(-t^2 / 2): the statistic of Epps and Pulley over the number of samples, which is left out so that its weight does
    not depend on the batch. The integral is a trapezoid rule of 17 knots from -5 to 5, which are folded onto 9.

    Args:
        features: Embeddings, (N, D).
        projections: Directions to project on, (D, P), unit vectors.

    Returns:
        Scalar: the mean over P; 0.41 where all embeddings are zero.
    """
    knots = torch.linspace(0, 5, 9, device=features.device)
    goal = (-knots.square() / 2).exp()
    phases = (features @ projections)[..., None] * knots  # (N, P, 9)
    distance = (phases.cos().mean(dim=0) - goal).square() + phases.sin().mean(dim=0).square()  # (P, 9)
    return 2 * torch.trapezoid(distance * goal, knots, dim=-1).mean()


def random_directions(dim: int, step: int, device: torch.device | None = None) -> Tensor:
    """(D, P) unit vectors, a function of the optimizer step: a resumed run and all processes draw the same ones."""
    drawn = torch.randn(dim, NUM_PROJECTIONS, generator=torch.Generator().manual_seed(step))
    if device is not None and device.type == "cuda":  # from page-locked memory, or the CPU would wait for the copy
        drawn = drawn.pin_memory().to(device, non_blocking=True)
    return F.normalize(drawn, dim=0)


def subspace_mask(dim: int) -> Tensor:
    """(D, P) of zeros and ones: direction p is left with the coordinates of subspace p modulo their number."""
    count = min(NUM_SUBSPACES, dim)
    of_coordinate = torch.arange(dim) * count // dim
    return (of_coordinate[:, None] == torch.arange(NUM_PROJECTIONS) % count).float()


DEFAULT_WEIGHTS: dict[str, dict[str, float]] = {
    "variance_hinge": {"variance": 0.1},
    "vicreg": {"variance": 1.0, "covariance": 0.05, "curvature": 1.0, "temporal_similarity": 0.0},
    "barlow_twins": {"invariance": 1.0, "redundancy": 0.005},
    "sigreg": {"sigreg": 10.0},
    "subspace_sigreg": {"sigreg": 10.0},
    "dino_centering": {"centering": 1.0},
}


class Regularizer(nn.Module):
    """An anti-collapse regularizer: a weighted sum of terms over the encoded sequence.

    * "variance_hinge" is the recipe of the first pendulum JEPA, `variance`: 0.1 * ReLU(1 - std).
    * "vicreg" is VICReg (Bardes et al. 2022) over several times of the sequence, with weights per term: `variance` (
      the hinge), `covariance` (divided by D), `temporal_similarity` (the difference of consecutive embeddings, 0
      by default: it penalizes fast motion) and `curvature` (second difference in time), which VICReg does not have.
    * "barlow_twins": `invariance` and `redundancy` of the cross-correlation between consecutive times.
    * "sigreg": `sigreg`, the SIGReg statistic, the distance from a standard normal distribution along random lines.
    * "subspace_sigreg": the same along lines within orthogonal subspaces, which are drawn once and frozen (Sub-JEPA 2026):
      what lies in one of them is normally distributed, and may depend on what lies in another.
    * "dino_centering": `centering`, the squared distance of the batch mean from its own moving average. It does **not**
      prevent collapse, a constant embedding satisfies it; it is an ablation that the collapse alarm must catch.

    Args:
        name: Name of the regularizer, one of these.
        dim: Embedding dimension D.
        weights: Weight of each term, >= 0; terms left out keep their default.

    Raises:
        ValueError: An unknown name or term, or a negative weight.
    """

    center: Tensor
    rotation: Tensor
    mask: Tensor

    def __init__(self, name: RegularizerName, dim: int, weights: dict[str, float] | None = None) -> None:
        super().__init__()
        if name not in DEFAULT_WEIGHTS:
            raise ValueError(f"model.regularizer={name!r}: choose one of {', '.join(DEFAULT_WEIGHTS)}.")
        for term, weight in (weights or {}).items():
            if term not in DEFAULT_WEIGHTS[name]:
                raise ValueError(
                    f"model.regularizer_weights names {term!r}: regularizer {name!r} has {', '.join(DEFAULT_WEIGHTS[name])}."
                    " If the weights come from a YAML for another one, set model.regularizer_weights to null."
                )
            if not weight >= 0:
                raise ValueError(f"model.regularizer_weights: {term}={weight} must be >= 0.")
        self.name = name
        self.weights = DEFAULT_WEIGHTS[name] | (weights or {})
        if name == "dino_centering":
            self.register_buffer("center", torch.zeros(dim))
        if name == "subspace_sigreg":
            drawn = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0))
            self.register_buffer("rotation", torch.linalg.qr(drawn).Q)  # kept: another library may round another one
            self.register_buffer("mask", subspace_mask(dim), persistent=False)

    @property
    def needed_times(self) -> int:
        """Number of times T that the terms compare."""
        if self.name == "vicreg":
            return 3 if self.weights["curvature"] else 2 if self.weights["temporal_similarity"] else 1
        return 2 if self.name == "barlow_twins" else 1

    def forward(self, features: Tensor, step: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum and the unweighted terms.

        Args:
            features: Embeddings from the context encoder, of all processes, (B, T, D).
            step: Optimizer step, which random directions are a function of.
        """
        with torch.autocast(features.device.type, enabled=False):
            terms = self._terms(features.float(), step)
            total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return total, terms

    def _terms(self, features: Tensor, step: int) -> dict[str, Tensor]:
        flat = features.flatten(0, 1)  # (B * T, D)
        if self.name == "barlow_twins":
            penalties = cross_correlation_penalties(features[:, :-1].flatten(0, 1), features[:, 1:].flatten(0, 1))
            return dict(zip(("invariance", "redundancy"), penalties, strict=True))
        if self.name == "sigreg":
            return {"sigreg": gaussian_distance(flat, random_directions(flat.shape[1], step, flat.device))}
        if self.name == "subspace_sigreg":
            lines = F.normalize(self.mask * random_directions(flat.shape[1], step, flat.device), dim=0)
            return {"sigreg": gaussian_distance(flat @ self.rotation, lines)}
        if self.name == "dino_centering":
            mean = flat.mean(dim=0)
            distance = (mean - self.center).square().mean()
            with torch.no_grad():
                self.center.lerp_(mean, 1 - CENTER_MOMENTUM)
            return {"centering": distance}
        terms = {"variance": variance_hinge(flat)}
        if self.name == "vicreg":
            terms |= {
                "covariance": covariance_penalty(flat),
                "curvature": curvature(features),
                "temporal_similarity": similarity_in_time(features),
            }
        return terms
