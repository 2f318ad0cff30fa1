"""Classifiers that need no training: the vote of nearest neighbors, and ridge regression in closed form.

Both work through their samples in parts, so that what they hold at a time does not grow with the number of samples, and of
the number of classes only linearly: ImageNet's images and the classes of ImageNet-22k fit.
Shapes: N members of a bank, Q queries, D width, C classes, k neighbors.
"""

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics.utilities import dim_zero_cat

from jepa_lightning.wide import WideMetric

QUERY_ROWS = 1024
"""Queries that are compared at a time."""

BANK_ROWS = 2**15
"""Members that they are compared with at a time."""

PART_BYTES = 2**26
"""Greatest size of a table that grows with the classes or with the square of the neighbors."""


class OnlineClassifiers(WideMetric):
    """What features know of classes, while they are learned: a vote of nearest neighbors, and a linear classifier.

    Neither needs training: the votes of the k most similar neighbors weigh exp(cosine similarity / temperature) (Wu et
    al. 2018), and the linear classifier is a ridge regression in closed form. Every other sample, in the order of arrival,
    is what they learn from; the rest are judged.

    Args:
        num_neighbors: k; fewer where there are fewer.
        temperature: Of the weights.
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
        """Take in features (N, D) and class indices (N,)."""
        self.features.append(features.detach().float())
        self.labels.append(labels)

    def compute(self) -> dict[str, Tensor]:
        """Fractions that are right, scalars: "knn_accuracy" and "linear_accuracy"."""
        features, labels = dim_zero_cat(self.features), dim_zero_cat(self.labels)
        halves = (features[0::2], labels[0::2], features[1::2], labels[1::2])
        bank, bank_labels, judged, answers = halves
        mean = bank.mean(dim=0)
        votes = vote(directions(bank, mean), bank_labels, directions(judged, mean), self.num_neighbors, self.temperature)
        return {
            "knn_accuracy": (votes == answers).float().mean(),
            "linear_accuracy": ridge_accuracy(*halves),
        }


def directions(features: Tensor, mean: Tensor) -> Tensor:
    """Unit vectors from a mean to each feature, (N, D): without the mean, all of average-pooled features look alike."""
    return functional.normalize(features - mean, dim=1)


def vote(bank: Tensor, bank_labels: Tensor, queries: Tensor, num_neighbors: int, temperature: float) -> Tensor:
    """What the most similar members of a bank say.

    Args:
        bank: (N, D), unit vectors.
        bank_labels: (N,), class indices.
        queries: (Q, D), unit vectors.
        num_neighbors: k; fewer where the bank is smaller.
        temperature: Of the weights exp(cosine similarity / temperature).

    Returns:
        (Q,), the class with the greatest sum of weights.
    """
    parts = [nearest(bank, bank_labels, part, num_neighbors) for part in queries.split(QUERY_ROWS)]
    return torch.cat([majority(similarities, labels, temperature) for similarities, labels in parts])


def nearest(bank: Tensor, bank_labels: Tensor, queries: Tensor, num_neighbors: int) -> tuple[Tensor, Tensor]:
    """The most similar members of a bank.

    Args:
        bank: (N, D), unit vectors, on any device.
        bank_labels: (N,), class indices, where the bank is.
        queries: (Q, D), unit vectors.
        num_neighbors: k; fewer where the bank is smaller.

    Returns:
        Similarities (Q, k), greatest first, and classes (Q, k), on the queries' device.
    """
    found, labels = queries.new_empty(len(queries), 0), bank_labels.new_empty(len(queries), 0).to(queries.device)
    for part, part_labels in zip(bank.split(BANK_ROWS), bank_labels.split(BANK_ROWS), strict=True):
        similarities = queries @ part.to(queries.device).T
        best, places = similarities.topk(min(num_neighbors, len(part)), dim=1)
        joined = torch.cat([found, best], dim=1), torch.cat([labels, part_labels.to(queries.device)[places]], dim=1)
        found, labels = best_of(*joined, num_neighbors)
    return found, labels


def best_of(similarities: Tensor, labels: Tensor, num_neighbors: int) -> tuple[Tensor, Tensor]:
    """The greatest similarities of candidates and their classes, greatest first: (Q, any) twice -> (Q, k) twice."""
    found, places = similarities.topk(min(num_neighbors, similarities.shape[1]), dim=1)
    return found, labels.gather(1, places)


def majority(similarities: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The class with the greatest sum of weights exp(similarity / temperature): (Q, k) twice -> (Q,).

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


def ridge_accuracy(bank: Tensor, bank_labels: Tensor, features: Tensor, labels: Tensor, penalty: float = 1e-4) -> Tensor:
    """How often a ridge regression of the classes on standardized features, fitted on a bank, is right.

    The regression of one-hot classes needs no table of samples by classes, nor one of classes by classes: the sum of the
    centerd features of each class is all that is kept of the labels.

    Args:
        bank: (N, D).
        bank_labels: (N,), class indices.
        features: (Q, D) to be judged.
        labels: (Q,).
        penalty: Relative to the variance of each feature, see `jepa_lightning.metrics.RidgeProbe`.

    Returns:
        Scalar; NaN if there is nothing to judge.
    """
    count, dim = bank.shape
    num_classes = int(bank_labels.max()) + 1
    mean = torch.stack([part.double().sum(dim=0) for part in bank.split(QUERY_ROWS)]).sum(dim=0) / count
    covariance = torch.zeros(dim, dim, dtype=torch.float64, device=bank.device)
    sums = torch.zeros(num_classes, dim, device=bank.device)
    for part, part_labels in zip(bank.split(QUERY_ROWS), bank_labels.split(QUERY_ROWS), strict=True):
        centerd = part.double() - mean
        covariance += centerd.T @ centerd / count
        sums.index_add_(0, part_labels, centerd.float())
    sums /= count
    # A dimension that never varies would make the system singular; it gets the weight 0.
    covariance += torch.diag(penalty * covariance.diagonal() + 1e-12)
    factor = torch.linalg.cholesky_ex(covariance).L  # without a check: NaN stays NaN, and ends no run
    prior = torch.bincount(bank_labels, minlength=num_classes) / count
    right = labels.new_zeros(())
    rows = min(QUERY_ROWS, max(1, PART_BYTES // (4 * num_classes)))
    for part, answers in zip(features.split(rows), labels.split(rows), strict=True):
        # The system is solved for the queries: (Q, D) instead of (D, C) in double precision.
        solved = torch.cholesky_solve((part.double() - mean).T, factor).T
        scores = prior + solved.float() @ sums.T  # (Q, C)
        right += (scores.argmax(dim=1) == answers).sum()
    return right / len(labels)
