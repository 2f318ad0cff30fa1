"""The linear probe in closed form: its sums, the choice of its penalty, and its report."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_script, small_ijepa, small_images, trainer, write_images
from test_classifiers import mixture, ridge_scores_by_the_formula

import jepa_lightning.probes.images.ridge
from jepa_lightning.classifiers import RidgeClassifier, classify
from jepa_lightning.probes import RidgeProbe


def fitted(features: torch.Tensor, labels: torch.Tensor, classes: int, rows: int = 32) -> RidgeClassifier:
    fit = RidgeClassifier(features.shape[1], classes)
    for part, part_labels in zip(features.split(rows), labels.split(rows), strict=True):
        fit.update(part, part_labels)
    return fit


@pytest.mark.parametrize("penalty", [1e-6, 1e-2, 1.0])
def test_scores_equal_the_normal_equations_written_out(penalty: float) -> None:
    (members, member_labels), (features, _) = mixture(300, 9, 16, 2.0), mixture(101, 9, 16, 2.0, seed=1)
    expected = ridge_scores_by_the_formula(members, member_labels, features, penalty)
    weights = fitted(members, member_labels, 9).weights(penalty)
    torch.testing.assert_close(weights[0] + features @ weights[1:], expected.float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(classify(features, weights), expected.argmax(dim=1))


def test_two_halves_are_the_whole() -> None:
    features, labels = mixture(200, 5, 8, 2.0)
    one, other, whole = (fitted(features[rows], labels[rows], 5) for rows in (slice(0, 70), slice(70, 200), slice(0, 200)))
    one.add(other)
    torch.testing.assert_close(one.weights(1e-3), whole.weights(1e-3))


def test_dimensions_that_never_vary_have_no_weight_however_large_they_are() -> None:
    features, labels = mixture(200, 5, 8, 1.0)
    plain = fitted(features, labels, 5).weights(1e-4)
    features[:, 1] = 3e4 + 1 / 3  # its variance is nothing but rounding
    weights = fitted(features, labels, 5).weights(1e-4)
    assert weights.isfinite().all() and weights[2].abs().max() < 1e-6
    torch.testing.assert_close(weights[3:], plain[3:], rtol=1e-3, atol=1e-4)


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """Two classes of 60 images that differ a little."""
    for name in ("ant", "bee"):
        write_images(tmp_path / "noise" / name, 60, size=(16, 16), hue=0 if name == "ant" else 3)
    return tmp_path / "noise"


@pytest.fixture
def checkpoint(tmp_path: Path, noise: Path) -> str:
    run = trainer(tmp_path, max_steps=1, enable_checkpointing=True)
    run.fit(small_ijepa(), small_images(noise))
    run.save_checkpoint(tmp_path / "ijepa.ckpt")
    return str(tmp_path / "ijepa.ckpt")


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_the_penalty_is_chosen_on_training_images_and_the_map_fitted_on_all(
    tmp_path: Path, noise: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole probe, written out for each kind of features."""
    monkeypatch.setattr(jepa_lightning.probes.images.ridge, "MIN_CHOOSING", 1)
    data = small_images(noise, val_fraction=0.3)
    probe = RidgeProbe(checkpoint)
    trainer(tmp_path).test(probe, data, verbose=False)
    found = report(tmp_path)["accuracy"]
    assert list(found) == ["last", "last_four", "untrained_last", "untrained_last_four", "pixels"]

    def features(loader: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        batches = [data.on_after_batch_transfer(batch, 0) for batch in loader]
        parts = [probe.features(batch.images) for batch in batches]
        return {name: torch.cat([part[name] for part in parts]) for name in found}, torch.cat([b.labels for b in batches])

    train, labels = features(data.plain_train_dataloader())
    test, answers = features(data.test_dataloader())
    assert len(labels) == 84 and len(answers) == 36
    held = torch.arange(len(labels)) % 10 == 9
    penalties = set()
    for name, figures in found.items():

        def right(rows: torch.Tensor, asked: torch.Tensor, true: torch.Tensor, penalty: float, name: str = name) -> int:
            scores = ridge_scores_by_the_formula(train[name][rows], labels[rows], asked, penalty)
            return int((scores.argmax(dim=1) == true).sum())

        scores = {penalty: right(~held, train[name][held], labels[held], penalty) for penalty in probe.penalties}
        best = max(penalty for penalty, score in scores.items() if score == max(scores.values()))
        assert figures["penalty"] == best, name
        whole = torch.ones_like(held)
        accuracy = right(whole, test[name], answers, best) / 36
        assert figures["accuracy"] == pytest.approx(accuracy), name
        assert figures["standard_error"] == pytest.approx((accuracy * (1 - accuracy) / 36) ** 0.5)
        penalties.add(best)
    assert len(penalties) > 1, "there was something to choose"
    assert any(0.5 < figures["accuracy"] < 1 for figures in found.values()), "there was something to get wrong"
    text = (tmp_path / "report.md").read_text()
    assert "| pixels |" in text and "| penalty |" in text and "penalties were chosen on training images" in text


PROBE = """
import sys
from conftest import small_images, trainer
from jepa_lightning.probes import RidgeProbe
import torch

torch.set_num_threads(1)
out, checkpoint, root = sys.argv[1:]
run = trainer(out, devices=2, strategy="ddp")
run.test(RidgeProbe(checkpoint), small_images(root, batch_size=7, val_fraction=0.3), verbose=False)
"""


def test_two_processes_report_what_one_reports(tmp_path: Path, noise: Path, checkpoint: str) -> None:
    run_script(PROBE, tmp_path / "two", checkpoint, str(noise))
    data = small_images(noise, batch_size=7, val_fraction=0.3)
    trainer(tmp_path / "one").test(RidgeProbe(checkpoint), data, verbose=False)
    one, two = (report(tmp_path / name) for name in ("one", "two"))
    for found in (one, two):
        found.pop("command")
    assert one == two


def test_the_penalty_is_chosen_on_few_of_many(
    tmp_path: Path, noise: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(jepa_lightning.probes.images.ridge, "MAX_CHOOSING", 4)
    monkeypatch.setattr(
        RidgeClassifier,
        "add",
        lambda self, other, add=RidgeClassifier.add: seen.append(int(other.moments[0, 0])) or add(self, other),
    )
    trainer(tmp_path).test(RidgeProbe(checkpoint, baselines=False), small_images(noise, val_fraction=0.3), verbose=False)
    assert seen == [4, 4] and set(report(tmp_path)["accuracy"]) == {"last", "last_four"}


def test_what_cannot_be_is_said(checkpoint: str) -> None:
    for penalties in ((), (0.0, 1.0), (1.0, -1.0)):
        with pytest.raises(ValueError, match=r"model\.penalties=.*give at least one, all positive"):
            RidgeProbe(checkpoint, penalties=penalties)


def test_with_a_handful_of_labels_the_penalty_is_not_left_to_chance(tmp_path: Path, noise: Path, checkpoint: str) -> None:
    probe = RidgeProbe(checkpoint, penalties=(1e-6, 3e-2, 10.0))
    run = trainer(tmp_path, limit_test_batches=1.0)
    run.test(probe, small_images(noise, fraction=0.1), verbose=False)
    report = json.loads((tmp_path / "report.json").read_text())["accuracy"]
    assert {figures["penalty"] for figures in report.values()} == {3e-2}
