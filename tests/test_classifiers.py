"""Classifiers without training: known answers, the formulas they stand for, and tables that stay small."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import jepa_lightning.classifiers
from jepa_lightning.classifiers import OnlineClassifiers, directions, majority, nearest, ridge_accuracy, vote


class Largest(TorchDispatchMode):
    """The size in bytes of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.untyped_storage().nbytes())
        return made


def mixture(count: int, classes: int, dim: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of classes that overlap, far from zero, one dimension dead."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, classes, (count,), generator=generator)
    features = 5 + centers[labels] + noise * torch.randn(count, dim, generator=generator)
    features[:, 1] = 3.0
    return features, labels


def votes_by_the_formula(memory_bank, bank_labels, queries, num_neighbors: int, temperature: float) -> torch.Tensor:
    """Wu et al. 2018, written out over all classes at once."""
    weights, neighbors = (queries @ memory_bank.T).topk(min(num_neighbors, len(memory_bank)), dim=1)
    sums = torch.zeros(len(queries), int(bank_labels.max()) + 1)
    return sums.scatter_add_(1, bank_labels[neighbors], (weights / temperature).exp()).argmax(dim=1)


def ridge_scores_by_the_formula(memory_bank, bank_labels, features, penalty: float) -> torch.Tensor:
    """The normal equations of one-hot classes, written out."""
    ones = torch.nn.functional.one_hot(bank_labels).double()
    mean, prior = memory_bank.double().mean(0), ones.mean(0)
    centered = memory_bank.double() - mean
    covariance, cross = centered.T @ centered / len(memory_bank), centered.T @ (ones - prior) / len(memory_bank)
    shrunk = covariance + torch.diag(penalty * covariance.diagonal() + 1e-12)
    return prior + (features.double() - mean) @ torch.linalg.solve(shrunk, cross)


def test_nearest_neighbors_know_clusters_and_guess_at_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (400,), generator=generator)
    clusters, noise = torch.randn(5, 8, generator=generator) * 5, torch.randn(400, 8, generator=generator)
    metric = OnlineClassifiers()
    metric.update(clusters[labels] + noise, labels)
    assert metric.compute() == {"knn_accuracy": 1, "linear_accuracy": 1}
    metric.reset()
    metric.update(noise, labels)
    assert all(0.1 < accuracy < 0.3 for accuracy in metric.compute().values())


@pytest.mark.parametrize("parts", [{}, {"QUERY_ROWS": 7, "BANK_ROWS": 11, "PART_BYTES": 1000}])
def test_votes_and_ridge_equal_their_formulas(parts: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one part and in many."""
    for name, value in parts.items():
        monkeypatch.setattr(jepa_lightning.classifiers, name, value)
    (memory_bank, bank_labels), (features, labels) = mixture(300, 9, 16, 2.0), mixture(101, 9, 16, 2.0, seed=1)
    mean = memory_bank.mean(dim=0)
    units = directions(memory_bank, mean), bank_labels, directions(features, mean)
    for neighbors, temperature in ((1, 0.07), (20, 0.07), (20, 1.0), (5000, 0.2)):
        expected = votes_by_the_formula(*units, neighbors, temperature)
        assert torch.equal(vote(*units, neighbors, temperature), expected)
    for penalty in (1e-4, 1.0):
        expected = ridge_scores_by_the_formula(memory_bank, bank_labels, features, penalty).argmax(dim=1)
        found = ridge_accuracy(memory_bank, bank_labels, features, labels, penalty)
        assert found == (expected == labels).float().mean() and 0.2 < found < 0.95


def test_the_penalty_counts() -> None:
    """With few samples in many dimensions the ridge decides."""
    (memory_bank, bank_labels), (features, labels) = mixture(40, 4, 36, 3.0), mixture(500, 4, 36, 3.0, seed=1)
    small, large = (ridge_accuracy(memory_bank, bank_labels, features, labels, penalty) for penalty in (1e-6, 1.0))
    assert large > small + 0.05


def test_nothing_to_evaluate_is_nan() -> None:
    memory_bank, labels = mixture(10, 2, 4, 1.0)
    assert ridge_accuracy(memory_bank, labels, memory_bank[:0], labels[:0]).isnan()


def test_the_most_similar_come_first_with_their_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jepa_lightning.classifiers, "BANK_ROWS", 3)
    memory_bank = torch.eye(8)
    queries = torch.tensor([[0.1, 0.9, 0, 0, 0, 0, 0.3, 0.2], [0, 0, 0.5, 0, 0, 0, 0, 0.8]])
    similarities, labels = nearest(memory_bank, torch.arange(8) * 10, queries, 3)
    assert labels[0].tolist() == [10, 60, 70] and labels[1, :2].tolist() == [70, 20]
    torch.testing.assert_close(similarities[0], torch.tensor([0.9, 0.3, 0.2]))
    assert nearest(memory_bank[:2], torch.arange(2), queries, 3)[0].shape == (2, 2), "fewer where the memory bank is smaller"
    assert nearest(memory_bank[:0], torch.arange(0), queries, 3)[1].shape == (2, 0)


def test_many_small_votes_outweigh_a_large_one_and_of_equal_classes_the_first_wins() -> None:
    similarities = torch.tensor([[0.9, 0.5, 0.5, 0.5]])
    labels = torch.tensor([[7, 3, 3, 3]])
    assert majority(similarities, labels, 1.0).tolist() == [3]
    assert majority(similarities, labels, 0.05).tolist() == [7]
    assert majority(torch.ones(1, 4), torch.tensor([[5, 2, 5, 2]]), 1.0).tolist() == [2]


def test_thousands_of_classes_need_no_large_tables() -> None:
    """8,000 classes, 1,000 samples of 384 numbers: one-hot rows and their moments took 562 MB in one table."""
    features, labels = torch.randn(1000, 384), torch.arange(1000) * 8 + 7
    with Largest() as largest:
        accuracy = ridge_accuracy(features, labels, features.repeat(3, 1), labels.repeat(3))
    assert accuracy == 1, "as many dimensions as separate a thousand images by heart"
    assert 4 * 8000 * 384 <= largest.size <= 40e6
    metric = OnlineClassifiers()
    metric.update(features, labels)
    with Largest() as largest:
        metric.compute()
    assert largest.size <= 40e6


def test_a_large_memory_bank_is_worked_through_in_parts() -> None:
    memory_bank = torch.nn.functional.normalize(torch.randn(300_000, 4), dim=1)
    labels = torch.arange(300_000) % 20_000
    with Largest() as largest:
        vote(memory_bank, labels, memory_bank[:1500], 20, 0.07)
    assert largest.size <= 4 * 1024 * 2**15, "1500 queries by 300,000 members would be 1.8 GB, by 20,000 classes 120 MB"


def test_the_vote_of_many_neighbors_is_counted_in_parts() -> None:
    similarities, labels = torch.rand(2000, 256), torch.arange(256).expand(2000, -1)
    with Largest() as largest:
        winners = majority(similarities, labels, 0.07)
    assert largest.size <= jepa_lightning.classifiers.PART_BYTES <= 70e6, "256 neighbors by 256 of 2000 would be 524 MB"
    assert torch.equal(winners, similarities.argmax(dim=1))


def test_processes_put_their_samples_together() -> None:
    """What one has seen twice is what two have seen, one after the other."""
    features, labels = mixture(40, 4, 8, 1.0)
    mine, whole = OnlineClassifiers(), OnlineClassifiers()
    mine.update(features, labels)
    whole.update(features.repeat(2, 1), labels.repeat(2))
    with mine.sync_context(dist_sync_fn=lambda state, group: [state, state], distributed_available=lambda: True):
        assert (
            mine._computed is None
            and torch.equal(mine.features, whole.features[0])
            and torch.equal(mine.labels, whole.labels[0])
        )
