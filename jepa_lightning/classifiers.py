"""Classifiers that need no gradient descent: the weighted k-NN vote, and ridge regression in closed form.

Both work in chunks, so that their memory does not grow with the number of samples, and only linearly with the number of
classes: ImageNet's images and the classes of ImageNet-22k fit.
Shapes: N members of the memory bank, Q queries, D embedding dimension, C classes, k neighbors.
"""

import torch
from torch import Tensor, distributed
from torch.nn import functional
from torchmetrics.utilities import dim_zero_cat

from jepa_lightning.wide import WideMetric

QUERY_ROWS = 1024
"""Queries that are compared at a time."""

BANK_ROWS = 2**15
"""Members that they are compared with at a time."""

PART_BYTES = 2**26
"""Maximum size in bytes of a table that grows with the classes or with the square of the neighbors."""


class OnlineClassifiers(WideMetric):
    """Online evaluation of a representation while it is trained: a k-NN classifier and a linear classifier.

    Neither needs training: the votes of the k most similar neighbors weigh exp(cosine similarity / temperature) (Wu et
    al. 2018), and the linear classifier is a ridge regression in closed form. Every other sample, in the order of arrival,
    is in the memory bank; the rest are evaluated.

    Args:
        num_neighbors: Number of neighbors k; all members if there are fewer.
        temperature: Temperature of the weights exp(cosine similarity / temperature).
    """

    full_state_update = False
    features: list[Tensor]
    labels: list[Tensor]

    def __init__(self, num_neighbors: int = 20, temperature: float = 0.07) -> None:
        super().__init__()
        self.num_neighbors, self.temperature = num_neighbors, temperature
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add embeddings (N, D) and class indices (N,)."""
        self.features.append(features.detach().float())
        self.labels.append(labels)

    def compute(self) -> dict[str, Tensor]:
        """Accuracies, scalars: "knn_accuracy" and "linear_accuracy"; none of fewer than two samples."""
        features, labels = dim_zero_cat(self.features), dim_zero_cat(self.labels)
        if len(labels) < 2:
            return {}
        halves = (features[0::2], labels[0::2], features[1::2], labels[1::2])
        members, member_labels, queries, answers = halves
        mean = members.mean(dim=0)
        votes = vote(
            directions(members, mean), member_labels, directions(queries, mean), self.num_neighbors, self.temperature
        )
        return {
            "knn_accuracy": (votes == answers).float().mean(),
            "linear_accuracy": ridge_accuracy(*halves),
        }


def directions(features: Tensor, mean: Tensor) -> Tensor:
    """Unit vectors from a mean to each embedding, (N, D): without the mean, all average-pooled embeddings look alike."""
    return functional.normalize(features - mean, dim=1)


def vote(members: Tensor, member_labels: Tensor, queries: Tensor, num_neighbors: int, temperature: float) -> Tensor:
    """Class by the weighted vote of the most similar members of a memory bank.

    Args:
        members: Embeddings in the memory bank, (N, D), unit vectors.
        member_labels: Class indices of the members, (N,).
        queries: Embeddings to classify, (Q, D), unit vectors.
        num_neighbors: Number of neighbors k; all members if there are fewer.
        temperature: Temperature of the weights exp(cosine similarity / temperature).

    Returns:
        (Q,), the class with the largest sum of weights.
    """
    parts = [nearest(members, member_labels, part, num_neighbors) for part in queries.split(QUERY_ROWS)]
    return torch.cat([majority(similarities, labels, temperature) for similarities, labels in parts])


def nearest(members: Tensor, member_labels: Tensor, queries: Tensor, num_neighbors: int) -> tuple[Tensor, Tensor]:
    """The most similar members of a memory bank.

    Args:
        members: Embeddings in the memory bank, (N, D), unit vectors, on any device.
        member_labels: Class indices of the members, (N,), on the same device.
        queries: Embeddings to compare with them, (Q, D), unit vectors.
        num_neighbors: Number of neighbors k; all members if there are fewer.

    Returns:
        Similarities (Q, k), largest first, and classes (Q, k), on the queries' device.
    """
    found, labels = queries.new_empty(len(queries), 0), member_labels.new_empty(len(queries), 0).to(queries.device)
    for part, part_labels in zip(members.split(BANK_ROWS), member_labels.split(BANK_ROWS), strict=True):
        similarities = queries @ part.to(queries.device).T
        best, places = similarities.topk(min(num_neighbors, len(part)), dim=1)
        joined = torch.cat([found, best], dim=1), torch.cat([labels, part_labels.to(queries.device)[places]], dim=1)
        found, labels = best_of(*joined, num_neighbors)
    return found, labels


def best_of(similarities: Tensor, labels: Tensor, num_neighbors: int) -> tuple[Tensor, Tensor]:
    """The largest similarities of candidates and their classes, largest first: (Q, any) twice -> (Q, k) twice."""
    found, places = similarities.topk(min(num_neighbors, similarities.shape[1]), dim=1)
    return found, labels.gather(1, places)


def majority(similarities: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The class with the largest sum of weights exp(similarity / temperature): (Q, k) twice -> (Q,).

    Of classes with the same sum it is the first. What is added up are the k neighbors of each query, not all classes.
    """
    rows = max(1, PART_BYTES // (4 * similarities.shape[1] ** 2))
    winners = []
    for weights, classes in zip((similarities / temperature).exp().split(rows), labels.split(rows), strict=True):
        same = classes[:, :, None] == classes[:, None]  # (Q, k, k)
        sums = (same * weights[:, None]).sum(dim=2)  # of the class of each neighbor
        best = sums == sums.amax(dim=1, keepdim=True)
        winners.append(classes.masked_fill(~best, torch.iinfo(classes.dtype).max).amin(dim=1))
    return torch.cat(winners)


def ridge_accuracy(
    members: Tensor, member_labels: Tensor, features: Tensor, labels: Tensor, penalty: float = 1e-4
) -> Tensor:
    """Accuracy of a ridge regression of the classes on standardized embeddings, fitted on a memory bank.

    The regression of one-hot classes needs no table of samples by classes, nor one of classes by classes: the sum of the
    centered embeddings of each class is all that is kept of the labels.

    Args:
        members: Embeddings to fit on, (N, D).
        member_labels: Class indices of the members, (N,).
        features: Embeddings to evaluate, (Q, D).
        labels: Class indices of the evaluated embeddings, (Q,).
        penalty: Ridge penalty relative to the variance of each dimension, see `jepa_lightning.metrics.RidgeR2`.

    Returns:
        Scalar; NaN if there is nothing to evaluate.
    """
    count, dim = members.shape
    num_classes = int(member_labels.max()) + 1
    mean = torch.stack([part.double().sum(dim=0) for part in members.split(QUERY_ROWS)]).sum(dim=0) / count
    covariance = torch.zeros(dim, dim, dtype=torch.float64, device=members.device)
    sums = torch.zeros(num_classes, dim, device=members.device)
    for part, part_labels in zip(members.split(QUERY_ROWS), member_labels.split(QUERY_ROWS), strict=True):
        centered = part.double() - mean
        covariance += centered.T @ centered / count
        sums.index_add_(0, part_labels, centered.float())
    sums /= count
    # A dimension that never varies would make the system singular; it gets the weight 0.
    covariance += torch.diag(penalty * covariance.diagonal() + 1e-12)
    factor = torch.linalg.cholesky_ex(covariance).L  # without a check: NaN stays NaN, and ends no run
    prior = torch.bincount(member_labels, minlength=num_classes) / count
    right = labels.new_zeros(())
    rows = min(QUERY_ROWS, max(1, PART_BYTES // (4 * num_classes)))
    for part, answers in zip(features.split(rows), labels.split(rows), strict=True):
        # The system is solved for the queries: (Q, D) instead of (D, C) in double precision.
        solved = torch.cholesky_solve((part.double() - mean).T, factor).T
        scores = prior + solved.float() @ sums.T  # (Q, C)
        right += (scores.argmax(dim=1) == answers).sum()
    return right / len(labels)


class RidgeClassifier:
    """Ridge regression of one-hot classes on standardized embeddings, fitted in closed form on any number of samples.

    Kept are the sums that the normal equations need, not the samples: (1 + D)^2 + C (1 + D) numbers in float64.

    Args:
        dim: Embedding dimension D.
        num_classes: Number of classes C.
        device: Device of the sums.
    """

    def __init__(self, dim: int, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.moments = torch.zeros(1 + dim, 1 + dim, dtype=torch.float64, device=device)
        """Sums of the products of (1, embedding) with themselves."""
        self.class_sums = torch.zeros(num_classes, 1 + dim, dtype=torch.float64, device=device)
        """Sums of (1, embedding) of each class."""

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add embeddings (N, D) and class indices (N,)."""
        rows = functional.pad(features.double(), (1, 0), value=1.0)
        self.moments += rows.T @ rows
        self.class_sums.index_add_(0, labels, rows)

    def add(self, other: "RidgeClassifier") -> None:
        """Add the samples of another one."""
        self.moments += other.moments
        self.class_sums += other.class_sums

    def reduce(self) -> None:
        """Add the samples of all processes, to be called by all of them."""
        for sums in (self.moments, self.class_sums):
            distributed.all_reduce(sums)

    def weights(self, penalty: float) -> Tensor:
        """The fitted map from (1, embedding) to the scores of the classes, (1 + D, C) in float32.

        Args:
            penalty: Ridge penalty, relative to the variance of each dimension.
        """
        count, mean = self.moments[0, 0], self.moments[0, 1:] / self.moments[0, 0]
        covariance = self.moments[1:, 1:] / count - torch.outer(mean, mean)
        prior = self.class_sums[:, 0] / count
        shared = self.class_sums[:, 1:] / count - torch.outer(prior, mean)  # covariance with the classes, (C, D)
        # A dimension that never varies would make the system singular, by rounding even worse; it gets the weight 0.
        ridge = penalty * covariance.diagonal().clamp(min=0) + 1e-12 * (1 + mean.square())
        factor = torch.linalg.cholesky_ex(
            covariance + torch.diag(ridge)
        ).L  # without a check: NaN stays NaN, and ends no run
        slopes = torch.cholesky_solve(shared.T, factor)
        return torch.cat([(prior - mean @ slopes)[None], slopes]).float()


def classify(features: Tensor, weights: Tensor) -> Tensor:
    """Class with the largest score: embeddings (N, D) and weights (1 + D, C) -> (N,)."""
    return (weights[0] + features.float() @ weights[1:]).argmax(dim=1)
