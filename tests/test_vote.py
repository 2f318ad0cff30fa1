"""The vote of nearest neighbors, by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from jepa_lightning.classifiers import directions, ridge_accuracy, vote

# Unit vectors at angles from a query at 0 degrees, and their classes.
ANGLES, LABELS = torch.tensor([0.0, 40.0, 42.0, 44.0, 90.0, 180.0]), torch.tensor([2, 0, 0, 0, 1, 1])
MEMORY_BANK = torch.stack([ANGLES.deg2rad().cos(), ANGLES.deg2rad().sin()], dim=1)
QUERY = torch.tensor([[1.0, 0.0]])


@pytest.mark.parametrize(
    ("neighbors", "temperature", "winner"),
    [
        (1, 1.0, 2),  # the nearest alone
        (2, 0.5, 2),  # two voices: the nearer one counts more
        (4, 1.0, 0),  # three nearly as near outvote the nearest
        (4, 0.05, 2),  # but not where the temperature is low: 3 exp(-(1 - cos 40) / 0.05) < 1
        (4, 0.5, 0),
        (6, 100.0, 0),
        (99, 100.0, 0),  # more than there are
    ],
)
def test_near_voices_count_by_similarity_over_temperature(neighbors: int, temperature: float, winner: int) -> None:
    assert vote(MEMORY_BANK, LABELS, QUERY, neighbors, temperature).tolist() == [winner]


def test_the_temperature_at_which_the_majority_wins_is_that_of_the_formula() -> None:
    similarities = ANGLES[1:4].deg2rad().cos().double()

    def majority(temperature: float) -> bool:
        return (similarities / temperature).exp().sum().item() > math.exp(1 / temperature)

    low, high = 0.01, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if majority(middle) else (middle, high)
    assert (
        vote(MEMORY_BANK, LABELS, QUERY, 4, 0.99 * low).item() == 2
        and vote(MEMORY_BANK, LABELS, QUERY, 4, 1.01 * high).item() == 0
    )


def test_many_queries_are_answered_one_by_one_and_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    memory_bank = F.normalize(torch.randn(50, 4, generator=generator), dim=1)
    labels = torch.arange(50) % 5
    queries = memory_bank.repeat(100, 1)  # more than are compared at a time
    assert torch.equal(vote(memory_bank, labels, queries, 1, 0.1), labels.repeat(100))
    assert vote(memory_bank, labels, queries[:0], 1, 0.1).shape == (0,)


def test_directions_are_unit_vectors_from_the_mean() -> None:
    mean = torch.tensor([1.0, 2.0])
    found = directions(torch.tensor([[4.0, 6.0], [1.0, 1.0]]), mean)
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [0.0, -1.0]]))


def test_a_linear_classifier_is_fitted_on_the_memory_bank_alone() -> None:
    """Labels that the memory bank contradicts are answered wrongly."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 3, generator=generator)
    labels = (features[:, 0] > 0).long()
    assert ridge_accuracy(features, labels, features, labels) > 0.95
    assert ridge_accuracy(features, labels, features, 1 - labels) < 0.05
    shifted = 1000 * features + 50  # standardized, so that a scale and a shift of all features change nothing
    assert ridge_accuracy(shifted, labels, shifted, labels) == ridge_accuracy(features, labels, features, labels)
