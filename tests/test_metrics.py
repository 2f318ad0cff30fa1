"""Metrics on data whose answer is known."""

import math

import pytest
import torch

from jepa_lightning.metrics import FeatureStatistics, OnlineClassifiers, RidgeProbe, r2_score, valid_prediction_time
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
        assert found["top_share"] == pytest.approx(1 / rank, rel=0.1)


def test_standard_deviations() -> None:
    features = torch.randn(5000, 2) * torch.tensor([2.0, 0.5])
    found = statistics(features)
    std = features.std(0, correction=0)
    assert found["feature_std"] == pytest.approx(std.mean().item(), rel=1e-4)
    assert found["feature_std_min"] == pytest.approx(std.min().item(), rel=1e-4)


def test_constant_features_are_collapsed_and_not_nan() -> None:
    found = statistics(torch.ones(100, 8) * 3)
    assert all(math.isfinite(value) for value in found.values())
    assert found["feature_std"] < 1e-6 and found["rankme"] <= 1.0001


def test_ridge_probe_equals_least_squares() -> None:
    features, other = torch.randn(300, 5) * 3 + 1, torch.randn(100, 5)
    weights = torch.randn(5, 2)
    labels, other_labels = (x @ weights + 0.3 * torch.randn(len(x), 2) + 7 for x in (features, other))
    probe = RidgeProbe(5, 2, ridge=0.0)
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
    probe = RidgeProbe(3, 1)
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
    errors = torch.tensor([[0.1, 0.5, 0.1, 0.6], [0.41, 0.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]])
    assert valid_prediction_time(errors, 0.4).tolist() == [2, 1, 4]


def test_nearest_neighbours_know_clusters_and_guess_at_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (400,), generator=generator)
    clusters, noise = torch.randn(5, 8, generator=generator) * 5, torch.randn(400, 8, generator=generator)
    metric = OnlineClassifiers()
    metric.update(clusters[labels] + noise, labels)
    assert metric.compute() == {"knn_accuracy": 1, "linear_accuracy": 1}
    metric.reset()
    metric.update(noise, labels)
    assert all(0.1 < accuracy < 0.3 for accuracy in metric.compute().values())


def test_sums_stay_wide_in_a_module_that_does_not() -> None:
    module = torch.nn.ModuleDict({"ranks": FeatureStatistics(4), "mean": WideMean()}).to(torch.bfloat16)
    for _ in range(1000):
        module["mean"].update(torch.tensor(1.5, dtype=torch.bfloat16))
        module["ranks"].update(torch.ones(1, 4, dtype=torch.bfloat16))
    assert module["mean"].compute() == 1.5 and module["mean"].weight == 1000
    assert module["ranks"].count == 1000 and module["ranks"].outer.dtype == torch.float64
    assert module.to("meta")["ranks"].outer.device.type == "meta"
