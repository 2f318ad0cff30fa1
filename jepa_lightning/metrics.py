"""Measures of a representation and of a forecast.

Those that are gathered over batches are `torchmetrics.Metric`s: their states are sums, so several processes give the
figures of one. Shapes: N samples, D width, L labels, T times.
"""

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics.utilities import dim_zero_cat

from jepa_lightning.wide import WideMetric


class FeatureStatistics(WideMetric):
    """Standard deviations and effective ranks of features, from their mean and covariance.

    Args:
        dim: D, width of the features.
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
        """Take in features of shape (..., D)."""
        flat = features.detach().flatten(0, -2).to(self.total.dtype)
        self.count += len(flat)
        self.total += flat.sum(dim=0)
        self.outer += flat.T @ flat

    def compute(self) -> dict[str, Tensor]:
        """Figures by name, scalars.

        feature_std, feature_std_min: mean and least standard deviation of a dimension.
        rankme: exp of the entropy of the normalised eigenvalues of the covariance, between 1 and D. (Garrido et al.
            2023 use the singular values of the uncentred features, which the mean dominates.)
        participation_ratio: (sum of eigenvalues)^2 / sum of their squares, between 1 and D.
        top_share: share of the greatest eigenvalue in their sum.
        """
        mean = self.total / self.count
        covariance = self.outer / self.count - torch.outer(mean, mean)
        std = covariance.diagonal().clamp(min=0).sqrt()
        eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0)
        # A constant feature has no directions at all; count it as one.
        share = eigenvalues / eigenvalues.sum().clamp(min=1e-30)
        return {
            "feature_std": std.mean(),
            "feature_std_min": std.min(),
            "rankme": torch.special.entr(share).sum().exp(),
            "participation_ratio": 1 / share.square().sum().clamp(min=1 / len(share)),
            "top_share": share.max(),
        }


class RidgeProbe(WideMetric):
    """A linear probe in closed form: ridge regression from features to labels, fitted on some samples and judged on others.

    Kept are the sums that the normal equations need, not the samples. Features are standardised, so `ridge` is relative
    to a feature's variance.

    Args:
        dim: D, width of the features.
        num_labels: L.
        ridge: Penalty.
    """

    full_state_update = False
    fit_moments: Tensor
    test_moments: Tensor

    def __init__(self, dim: int, num_labels: int, ridge: float = 1e-5) -> None:
        super().__init__()
        self.dim, self.ridge = dim, ridge
        size = 1 + dim + num_labels  # moments of (1, features, labels)
        for name in ("fit_moments", "test_moments"):
            self.add_state(name, torch.zeros(size, size, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, labels: Tensor, fit: bool) -> None:
        """Take in features (N, D) and labels (N, L), to fit on or to judge by."""
        rows = torch.cat([torch.ones_like(features[:, :1]), features, labels], dim=1).to(self.fit_moments.dtype)
        moments = self.fit_moments if fit else self.test_moments
        moments += rows.T @ rows

    def weights(self, ridge: float | None = None) -> Tensor:
        """The fitted map from (1, features) to labels: (1 + D, L)."""
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
        """1 - squared error / variance of each label on the judging samples: (L,)."""
        inputs, labels = slice(0, 1 + self.dim), slice(1 + self.dim, None)
        count, moments = self.test_moments[0, 0], self.test_moments
        squares = moments[labels, labels].diagonal()
        error = (
            squares - 2 * (weights * moments[inputs, labels]).sum(0) + (weights * (moments[inputs, inputs] @ weights)).sum(0)
        )
        return 1 - error / (squares - moments[0, labels].square() / count)

    def compute(self) -> Tensor:
        """R2 of each label on the judging samples: (L,)."""
        return self.r2(self.weights())


class OnlineClassifiers(WideMetric):
    """What features know of classes, while they are learned: a vote of nearest neighbours, and a linear classifier.

    Neither needs training: the votes of the k most similar neighbours weigh exp(cosine similarity / temperature) (Wu et
    al. 2018), and the linear classifier is a ridge regression in closed form. Every other sample, in the order of arrival,
    is what they learn from; the rest are judged.

    Args:
        num_neighbours: k; fewer where there are fewer.
        temperature: Of the weights.
    """

    full_state_update = False
    features: list[Tensor]
    labels: list[Tensor]

    def __init__(self, num_neighbours: int = 20, temperature: float = 0.07) -> None:
        super().__init__()
        self.num_neighbours, self.temperature = num_neighbours, temperature
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Take in features (N, D) and class indices (N,)."""
        self.features.append(features.detach().float())
        self.labels.append(labels)

    def compute(self) -> dict[str, Tensor]:
        """Fractions that are right, scalars: "knn_accuracy" and "linear_accuracy"."""
        features, labels = dim_zero_cat(self.features), dim_zero_cat(self.labels)
        halves = (features[0::2], labels[0::2], features[1::2], labels[1::2])
        bank, bank_labels, judged, answers = halves
        mean = bank.mean(dim=0)
        votes = vote(directions(bank, mean), bank_labels, directions(judged, mean), self.num_neighbours, self.temperature)
        return {
            "knn_accuracy": (votes == answers).float().mean(),
            "linear_accuracy": ridge_accuracy(*halves),
        }


def directions(features: Tensor, mean: Tensor) -> Tensor:
    """Unit vectors from a mean to each feature, (N, D): without the mean, all of average-pooled features look alike."""
    return functional.normalize(features - mean, dim=1)


def vote(bank: Tensor, bank_labels: Tensor, queries: Tensor, num_neighbours: int, temperature: float) -> Tensor:
    """What the most similar members of a bank say.

    Args:
        bank: (N, D), unit vectors.
        bank_labels: (N,), class indices.
        queries: (Q, D), unit vectors.
        num_neighbours: k; fewer where the bank is smaller.
        temperature: Of the weights exp(cosine similarity / temperature).

    Returns:
        (Q,), the class with the greatest sum of weights.
    """
    num_classes = int(bank_labels.max()) + 1
    found = [bank_labels.new_zeros(0)]
    for part in queries.split(4096):  # bounded memory
        weights, neighbours = (part @ bank.T).topk(min(num_neighbours, len(bank)), dim=1)
        votes = bank.new_zeros(len(part), num_classes)
        votes.scatter_add_(1, bank_labels[neighbours], (weights / temperature).exp())
        found.append(votes.argmax(dim=1))
    return torch.cat(found)


def ridge_accuracy(bank: Tensor, bank_labels: Tensor, features: Tensor, labels: Tensor, penalty: float = 1e-4) -> Tensor:
    """How often a ridge regression of the classes on standardised features, fitted on a bank, is right.

    Args:
        bank: (N, D).
        bank_labels: (N,), class indices.
        features: (Q, D) to be judged.
        labels: (Q,).
        penalty: Relative to the variance of each feature, see `RidgeProbe`.

    Returns:
        Scalar; NaN if there is nothing to judge.
    """
    classes = functional.one_hot(bank_labels)
    probe = RidgeProbe(bank.shape[1], classes.shape[1], penalty).to(bank.device)
    probe.update(bank, classes.to(bank.dtype), fit=True)
    weights = probe.weights()
    scores = weights[0] + features.to(weights.dtype) @ weights[1:]
    return (scores.argmax(dim=1) == labels).float().mean()


def reciprocal_ranks(similarities: Tensor, right: Tensor) -> Tensor:
    """One over the rank of the right candidate, ties counted fairly: the mean over all orders of equal candidates.

    Args:
        similarities: (Q, N) of each query to each candidate.
        right: (Q,), indices of the right candidates.

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
        errors: (N, T), of predictions 1 ... T steps ahead, relative to the spread of the data.
        threshold: 0.4 is usual for chaotic systems.

    Returns:
        (N,) in steps; T for forecasts that never fail.
    """
    failed = errors > threshold
    first = failed.int().argmax(dim=1) + 1
    return torch.where(failed.any(dim=1), first, errors.shape[1])
