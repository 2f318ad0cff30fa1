"""Metrics on data whose answer is known."""

import math

import pytest
import torch

from jepa_lightning.metrics import (
    ErrorOverMean,
    FeatureStatistics,
    RidgeR2,
    guarded_error,
    r2_score,
    reciprocal_ranks,
    valid_prediction_time,
)
from jepa_lightning.probes.images.linear import HalvesAccuracy
from jepa_lightning.wide import WideMean


def statistics(features: torch.Tensor) -> dict[str, float]:
    metric = FeatureStatistics(features.shape[-1])
    for part in features.split(77):
        metric.update(part)
    return {name: value.item() for name, value in metric.compute().items()}


def test_ranks_of_data_of_known_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator))
    for rank in (1, 3, 16):
        found = statistics(torch.randn(20_000, rank, generator=generator) @ basis[:rank] + 5)
        assert found["rankme"] == pytest.approx(rank, rel=0.01)
        assert found["participation_ratio"] == pytest.approx(rank, rel=0.01)
        assert found["largest_eigenvalue_share"] == pytest.approx(1 / rank, rel=0.1)


def test_standard_deviations() -> None:
    features = torch.randn(5000, 2) * torch.tensor([2.0, 0.5])
    found = statistics(features)
    std = features.std(0, correction=0)
    assert found["feature_std"] == pytest.approx(std.mean().item(), rel=1e-4)
    assert found["feature_std_min"] == pytest.approx(std.min().item(), rel=1e-4)


def test_constant_embeddings_are_collapsed_and_not_nan() -> None:
    found = statistics(torch.ones(100, 8) * 3)
    assert all(math.isfinite(value) for value in found.values())
    assert found["feature_std"] < 1e-6 and found["rankme"] <= 1.0001


def test_ridge_probe_equals_least_squares() -> None:
    features, other = torch.randn(300, 5) * 3 + 1, torch.randn(100, 5)
    weights = torch.randn(5, 2)
    labels, other_labels = (x @ weights + 0.3 * torch.randn(len(x), 2) + 7 for x in (features, other))
    probe = RidgeR2(5, 2, ridge=0.0)
    for part, part_labels in zip(features.split(64), labels.split(64), strict=True):
        probe.update(part, part_labels, fit=True)
    probe.update(other, other_labels, fit=False)

    ones = torch.cat([torch.ones(300, 1), features], dim=1)
    expected = torch.linalg.lstsq(ones, labels).solution
    torch.testing.assert_close(probe.weights().float(), expected, rtol=1e-3, atol=1e-3)
    predictions = torch.cat([torch.ones(100, 1), other], dim=1) @ expected
    torch.testing.assert_close(probe.compute(), r2_score(predictions, other_labels), rtol=1e-3, atol=1e-4)


def test_ridge_probe_ignores_a_dead_feature_and_shrinks_with_the_penalty() -> None:
    features = torch.randn(200, 3)
    features[:, 1] = 4.0
    labels = features[:, :1] * 2
    probe = RidgeR2(3, 1)
    probe.update(features, labels, fit=True)
    assert probe.weights(1e-6)[1:, 0].tolist() == pytest.approx([2, 0, 0], abs=1e-3)
    assert probe.weights(1.0)[1, 0].item() == pytest.approx(1, abs=0.1)


def test_r2_is_one_for_truth_zero_for_the_mean_and_negative_below() -> None:
    targets = torch.randn(50, 3)
    assert torch.equal(r2_score(targets, targets), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(
        r2_score(targets.mean(0).expand(50, 3), targets), torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0
    )
    assert (r2_score(-targets, targets) < -1).all()


def test_valid_prediction_time_is_the_first_step_past_the_threshold() -> None:
    errors = torch.tensor([[0.1, 0.75, 0.1, 0.8], [0.51, 0.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.5], [0.5, 0.5, 0.6, 0.1]])
    assert valid_prediction_time(errors, 0.5).tolist() == [2, 1, 4, 3]


def test_embeddings_that_are_not_finite_give_nan_and_no_exception() -> None:
    features = torch.randn(50, 4)
    features[7, 2] = float("inf")
    found = statistics(features)
    assert len(found) == 5 and all(math.isnan(value) for value in found.values())


def over_mean(predictions: torch.Tensor, targets: torch.Tensor, places: torch.Tensor | None = None, of: int = 1) -> float:
    metric = ErrorOverMean(targets.shape[-1], of)
    for rows in range(0, len(targets), 37):
        part = slice(rows, rows + 37)
        metric.update(predictions[part], targets[part], None if places is None else places[part])
    return metric.compute().item()


def test_error_over_the_mean_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, 5, (400, 3), generator=generator)
    means = 10 * torch.randn(5, 6, generator=generator)
    targets = means[places] + torch.randn(400, 3, 6, generator=generator)  # (400, 3, 6)
    predictions = targets + 0.5 * torch.randn(400, 3, 6, generator=generator)
    error = (predictions - targets).square().mean()
    variance = torch.stack([targets[places == place].var(dim=0) * ((places == place).sum() - 1) for place in range(5)])
    expected = error / (variance.mean(dim=1).sum() / (places.numel() - 5))
    assert over_mean(predictions, targets, places, 5) == pytest.approx(expected.item(), rel=1e-5)
    alone = error / targets.flatten(0, 1).var(dim=0).mean()
    assert over_mean(predictions, targets) == pytest.approx(alone.item(), rel=1e-5)


def test_knowing_the_mean_of_each_place_is_predicting_nothing() -> None:
    """As few samples as there may be: means of 2 or 3, and a place that is seen once and one that is not."""
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(400):
        places = torch.tensor([0, 0, 1, 1, 1, 2])
        means = torch.randn(4, 50, generator=generator)
        targets = means[places] + torch.randn(6, 50, generator=generator)
        ratios.append(over_mean(means[places], targets, places, 4))
    assert sum(ratios) / 400 == pytest.approx(1, abs=0.02)


def features_of_rank(rank: int, dim: int = 32, count: int = 4000, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator))
    return 2 + torch.randn(count, rank, generator=generator) @ basis[:rank]


def predicted(targets: torch.Tensor, ratio: float) -> torch.Tensor:
    """Predictions with an error of a fraction of the variance, made of the mean and the truth."""
    return targets + ratio**0.5 * (targets.mean(dim=0) - targets)


def guarded(predictions: torch.Tensor, targets: torch.Tensor, **places) -> float:
    ratio = torch.tensor(over_mean(predictions, targets, **places), dtype=torch.float64)
    return guarded_error(ratio, torch.tensor(statistics(targets)["rankme"]), targets.shape[-1]).item()


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.7, 0.95])
def test_collapse_is_worse_than_health_with_the_same_error(ratio: float) -> None:
    found = []
    for rank in (24, 8, 2, 1):
        targets = features_of_rank(rank)
        found.append(guarded(predicted(targets, ratio), targets))
        assert found[-1] == pytest.approx(1 - (1 - ratio) * rank / 32, abs=0.01)
    assert found == sorted(found) and len(set(found)) == 4


def test_no_error_is_small_enough_to_make_up_for_collapse() -> None:
    healthy, collapsed = features_of_rank(16), features_of_rank(1)
    assert guarded(predicted(healthy, 0.8), healthy) < guarded(collapsed, collapsed)


def test_embeddings_that_became_constant_or_noise_are_the_worst() -> None:
    constant = torch.full((400, 32), 3.0)
    noise = 3 + 1e-5 * torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    assert statistics(noise)["rankme"] > 30, "which RankMe alone holds for the best embeddings of all"
    assert guarded(constant, constant) == 1
    for guess in (3.0, 3.1):
        assert guarded(torch.full_like(noise, guess), noise) == pytest.approx(1, abs=0.01)
    nan = torch.tensor(math.nan)
    assert guarded_error(nan, torch.tensor(5.0), 8) == guarded_error(torch.tensor(0.5), nan, 8) == 1
    assert guarded_error(torch.tensor(34.0), torch.tensor(5.0), 8) == 1, "worse than nothing is no worse than that"


def test_embeddings_that_know_their_place_alone_have_collapsed() -> None:
    """One constant answer is beaten by far; the mean of each place is not."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, 16, (4000,), generator=generator)
    of_places = torch.randn(16, 32, generator=generator)
    targets = of_places[places] + 1e-3 * torch.randn(4000, 32, generator=generator)
    assert over_mean(of_places[places], targets) < 1e-5
    assert guarded(of_places[places], targets) < 0.7
    assert guarded(of_places[places], targets, places=places, of=16) > 0.98


def test_reciprocal_ranks_share_what_is_equal() -> None:
    similarities = torch.tensor([[0.9, 0.5, 0.1, 0.0], [0.9, 0.5, 0.1, 0.0], [0.3, 0.7, 0.3, 0.3], [1.0, 1.0, 1.0, 1.0]])
    found = reciprocal_ranks(similarities, torch.tensor([0, 2, 0, 3]))
    shared = (1 / 2 + 1 / 3 + 1 / 4) / 3, (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4
    assert found.tolist() == pytest.approx([1, 1 / 3, *shared])


def test_sums_stay_wide_in_a_module_that_does_not() -> None:
    module = torch.nn.ModuleDict({"ranks": FeatureStatistics(4), "mean": WideMean()}).to(torch.bfloat16)
    for _ in range(1000):
        module["mean"].update(torch.tensor(1.5, dtype=torch.bfloat16))
        module["ranks"].update(torch.ones(1, 4, dtype=torch.bfloat16))
    assert module["mean"].compute() == 1.5 and module["mean"].weight == 1000
    assert module["ranks"].count == 1000 and module["ranks"].outer.dtype == torch.float64
    assert module.to("meta")["ranks"].outer.device.type == "meta"


@pytest.mark.parametrize("kind", ["ridge", "halves"])
def test_sums_of_processes_are_added(kind: str) -> None:
    """As in two processes that have seen the same."""
    if kind == "ridge":
        metric = RidgeR2(3, 1)
        for fit in (True, False):
            metric.update(torch.randn(20, 3), torch.randn(20, 1), fit)
    else:
        metric = HalvesAccuracy(2)
        metric.update(torch.tensor([[0, 1], [1, 1], [0, 0]]), torch.tensor([0, 1, 1]))
    before = {name: state.clone() for name, state in metric.metric_state.items()}
    with metric.sync_context(dist_sync_fn=lambda state, group: [state, state], distributed_available=lambda: True):
        for name, state in metric.metric_state.items():
            assert torch.equal(state, 2 * before[name]) and before[name].any(), name
