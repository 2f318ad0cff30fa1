"""Measures of a representation and of a forecast.

Those that are gathered over batches are `torchmetrics.Metric`s: their states are sums, so several processes give the
figures of one. Shapes: N samples, D embedding dimension, L labels, T times.
"""

import math

import torch
from torch import Tensor

from jepa_lightning.wide import WideMetric


class FeatureStatistics(WideMetric):
    """Standard deviations and effective ranks of embeddings, from their mean and covariance.

    Args:
        dim: Embedding dimension D.
    """

    full_state_update = False
    count: Tensor
    total: Tensor
    outer: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(dim, dim, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Add embeddings (..., D)."""
        flat = features.detach().flatten(0, -2).to(self.total.dtype)
        self.count += len(flat)
        self.total += flat.sum(dim=0)
        self.outer += flat.T @ flat

    def compute(self) -> dict[str, Tensor]:
        """Figures by name, scalars.

        feature_std, feature_std_min: mean and minimum standard deviation of a dimension.
        rankme: exp of the entropy of the normalized eigenvalues of the covariance, between 1 and D. (Garrido et al.
            2023 use the singular values of the uncentered embeddings, which the mean dominates.)
        participation_ratio: (sum of eigenvalues)^2 / sum of their squares, between 1 and D.
        largest_eigenvalue_share: share of the largest eigenvalue in their sum.

        All are NaN if an embedding was not finite.
        """
        mean = self.total / self.count
        covariance = self.outer / self.count - torch.outer(mean, mean)
        if not covariance.isfinite().all():  # which no eigenvalues are computed of: say so, and let the run go on
            nan = covariance.new_tensor(math.nan)
            return dict.fromkeys(
                ("feature_std", "feature_std_min", "rankme", "participation_ratio", "largest_eigenvalue_share"), nan
            )
        std = covariance.diagonal().clamp(min=0).sqrt()
        eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0)
        # A constant embedding has no directions at all; count it as one.
        share = eigenvalues / eigenvalues.sum().clamp(min=1e-30)
        return {
            "feature_std": std.mean(),
            "feature_std_min": std.min(),
            "rankme": torch.special.entr(share).sum().exp(),
            "participation_ratio": 1 / share.square().sum().clamp(min=1 / len(share)),
            "largest_eigenvalue_share": share.max(),
        }


class ErrorOverMean(WideMetric):
    """Normalized error: squared error of predicted embeddings over that of predicting the mean of each place.

    1 means that nothing was predicted but the mean. Where embeddings differ by their place and by nothing else, which is
    one way to collapse, an answer that is the same at all places is beaten with ease, and this one is not.

    Args:
        dim: Embedding dimension D.
        num_places: Number of places P, such as patches; 1 where places mean nothing.
    """

    full_state_update = False
    error: Tensor
    squares: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(self, dim: int, num_places: int = 1) -> None:
        super().__init__()
        for name, shape in (("error", ()), ("squares", ()), ("sums", (num_places, dim)), ("counts", (num_places,))):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, targets: Tensor, places: Tensor | None = None) -> None:
        """Add predictions and targets, (..., D) each, and the index of the place of each, (...)."""
        goals = targets.detach().flatten(0, -2).double()
        self.error += (predictions.detach().flatten(0, -2).double() - goals).square().sum()
        self.squares += goals.square().sum()
        indices = torch.zeros(len(goals), dtype=torch.int64, device=goals.device) if places is None else places.flatten()
        self.sums.index_add_(0, indices, goals)
        self.counts.index_add_(0, indices, torch.ones_like(goals[:, 0]))

    def compute(self) -> Tensor:
        """The ratio, a scalar >= 0; NaN or infinite where no two targets of a place differ."""
        within = self.squares - (self.sums.square().sum(dim=1) / self.counts.clamp(min=1)).sum()
        freedom = (self.counts - 1).clamp(min=0).sum()  # the mean of few samples is nearer to them than that of many
        return (self.error / self.counts.sum()) / (within.clamp(min=0) / freedom)


def guarded_error(ratio: Tensor, rankme: Tensor, dim: int) -> Tensor:
    """The share of an embedding space that is not both used and predicted: a label-free criterion for checkpoints.

    A loss, or an error over that of some baseline, can be made small by embeddings that hold little. So the share of the
    variance that is predicted, 1 - ratio, counts for as many of the D dimensions as the embeddings use, which is their
    RankMe: the result is 1 - (1 - ratio) RankMe / D. Embeddings that lie in r of D dimensions never get below 1 - r / D,
    however well they are predicted; to multiply the error with D / RankMe instead would still let them win with an error
    of zero. Embeddings that collapsed to a constant have a RankMe that says nothing, that of their rounding errors, which
    may be large; but nobody predicts those, so that the ratio is 1 and so is the result.

    Args:
        ratio: Prediction error over that of the best trivial baseline: see `ErrorOverMean`. Between 0 and 1, or more; NaN
            counts as nothing predicted.
        rankme: RankMe of the target embeddings, see `FeatureStatistics`.
        dim: Embedding dimension D.

    Returns:
        Scalar in [0, 1]; lower is better.
    """
    used_and_predicted = (1 - ratio).clamp(min=0) * rankme / dim
    return 1 - torch.nan_to_num(used_and_predicted)


class RidgeR2(WideMetric):
    """A linear probe in closed form: ridge regression from embeddings to labels, with samples to fit and to evaluate on.

    Kept are the sums that the normal equations need, not the samples. Embeddings are standardized, so `ridge` is relative
    to the variance of a dimension.

    Args:
        dim: Embedding dimension D.
        num_labels: Number of labels L.
        ridge: Ridge penalty, relative to the variance of a dimension.
    """

    full_state_update = False
    fit_moments: Tensor
    test_moments: Tensor

    def __init__(self, dim: int, num_labels: int, ridge: float = 1e-5) -> None:
        super().__init__()
        self.dim, self.ridge = dim, ridge
        size = 1 + dim + num_labels  # moments of (1, embeddings, labels)
        for name in ("fit_moments", "test_moments"):
            self.add_state(name, torch.zeros(size, size, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, labels: Tensor, fit: bool) -> None:
        """Add embeddings (N, D) and labels (N, L), to fit or to evaluate on."""
        rows = torch.cat([torch.ones_like(features[:, :1]), features, labels], dim=1).to(self.fit_moments.dtype)
        moments = self.fit_moments if fit else self.test_moments
        moments += rows.T @ rows

    def weights(self, ridge: float | None = None) -> Tensor:
        """The fitted map from (1, embedding) to labels: (1 + D, L)."""
        features, labels = slice(1, 1 + self.dim), slice(1 + self.dim, None)
        count = self.fit_moments[0, 0]
        mean = self.fit_moments[0] / count
        covariance = self.fit_moments / count - torch.outer(mean, mean)
        penalty = torch.diag(covariance.diagonal()[features]) * (self.ridge if ridge is None else ridge)
        # A dimension that never varies would make the system singular; it gets the weight 0.
        penalty += 1e-12 * torch.eye(self.dim, dtype=penalty.dtype, device=penalty.device)
        slopes = torch.linalg.solve(covariance[features, features] + penalty, covariance[features, labels])
        return torch.cat([(mean[labels] - mean[features] @ slopes)[None], slopes])

    def r2(self, weights: Tensor) -> Tensor:
        """1 - squared error / variance of each label on the evaluation samples: (L,)."""
        inputs, labels = slice(0, 1 + self.dim), slice(1 + self.dim, None)
        count, moments = self.test_moments[0, 0], self.test_moments
        squares = moments[labels, labels].diagonal()
        error = (
            squares - 2 * (weights * moments[inputs, labels]).sum(0) + (weights * (moments[inputs, inputs] @ weights)).sum(0)
        )
        return 1 - error / (squares - moments[0, labels].square() / count)

    def compute(self) -> Tensor:
        """R2 of each label on the evaluation samples: (L,); NaN without samples to fit or to evaluate on."""
        if not self.fit_moments[0, 0] or not self.test_moments[0, 0]:
            return torch.full_like(self.test_moments[0, 1 + self.dim :], math.nan)
        return self.r2(self.weights())


def reciprocal_ranks(similarities: Tensor, right: Tensor) -> Tensor:
    """One over the rank of the right candidate, ties counted fairly: the mean over all orders of equal candidates.

    Args:
        similarities: Similarities of each query to each candidate, (Q, N).
        right: Indices of the right candidates, (Q,).

    Returns:
        (Q,) in (0, 1].
    """
    found = similarities.gather(1, right[:, None])
    better = (similarities > found).sum(dim=1)
    equal = (similarities == found).sum(dim=1)  # itself included
    harmonic = torch.arange(similarities.shape[1] + 1, dtype=torch.float64, device=similarities.device)
    harmonic = torch.where(harmonic > 0, 1 / harmonic, 0).cumsum(0)  # H_0 ... H_N
    return (harmonic[better + equal] - harmonic[better]) / equal


def r2_score(predictions: Tensor, targets: Tensor) -> Tensor:
    """1 - squared error / variance per label, (N, L) twice -> (L,): 1 is perfect, 0 is the mean, and it can be negative."""
    predictions, targets = predictions.double(), targets.double()
    error = (predictions - targets).square().sum(dim=0)
    return 1 - error / (targets - targets.mean(dim=0)).square().sum(dim=0)


def valid_prediction_time(errors: Tensor, threshold: float = 0.4) -> Tensor:
    """How long each forecast stays valid: the first step whose error exceeds the threshold.

    Args:
        errors: Errors of predictions 1 ... T steps ahead, (N, T), relative to the spread of the data.
        threshold: Error above which a forecast is no longer valid; 0.4 is usual for chaotic systems.

    Returns:
        (N,) in steps; T for forecasts that never fail.
    """
    failed = errors > threshold
    first = failed.int().argmax(dim=1) + 1
    return torch.where(failed.any(dim=1), first, errors.shape[1])
