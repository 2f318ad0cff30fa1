"""The linear probe: frozen embeddings, honest choice, baselines next to them."""

import json
from pathlib import Path

import pytest
import torch
from conftest import small_data, small_ijepa, small_images, small_model, trainer, write_images

from datamodules import MultiTask
from jepa_lightning.probes import AttentiveProbe, KNNProbe, LinearProbe
from jepa_lightning.probes.images.linear import HalvesAccuracy


@pytest.fixture
def checkpoint(tmp_path: Path, image_root: Path) -> str:
    run = trainer(tmp_path, max_steps=1, enable_checkpointing=True)
    run.fit(small_ijepa(encoder_depth=5), small_images(image_root))
    run.save_checkpoint(tmp_path / "ijepa.ckpt")
    return str(tmp_path / "ijepa.ckpt")


def test_fit_and_test_write_a_report_with_baselines(tmp_path: Path, image_root: Path, checkpoint: str) -> None:
    probe = LinearProbe(checkpoint, num_classes=2, learning_rates=(0.01, 0.1))
    before = {name: value.clone() for name, value in probe.encoder.state_dict().items()}
    run = trainer(tmp_path, max_epochs=20, limit_val_batches=1.0)
    data = small_images(image_root, val_fraction=0.4)
    run.fit(probe, data)
    for name, value in probe.encoder.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} is not frozen"
    assert run.callback_metrics["val/accuracy_last"] == 1, "the two classes differ in color"
    run.test(probe, data, verbose=False)
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["accuracy"]) == set(LinearProbe.names)
    assert report["accuracy"]["last_four"]["accuracy"] == 1 and report["judged"].startswith("on 6 held-out images")
    assert report["accuracy"]["pixels"]["learning_rate"] in (0.01, 0.1)
    assert "| pixels | 1.000 |" in (tmp_path / "report.md").read_text()


def test_classifiers_do_not_disturb_each_other(checkpoint: str) -> None:
    """The gradient of one is the same whether the others are there or not."""
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 2
    gradients = []
    for rates in ((0.1,), (0.1, 0.3, 0.5)):
        torch.manual_seed(0)
        probe = LinearProbe(checkpoint, num_classes=2, learning_rates=rates, weight_decays=(0.0,)).train()
        head = probe.heads["last_0"]
        torch.nn.init.ones_(head.weight)
        logits = probe.logits(images)
        repeated = labels[:, None].expand(-1, logits.shape[1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), repeated.flatten()) * logits.shape[1]
        loss.backward()
        gradients.append(head.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("kind", "own"), [(LinearProbe, {"last", "last_four"}), (AttentiveProbe, {"attentive"})])
def test_baselines_can_be_left_out(tmp_path: Path, image_root: Path, checkpoint: str, kind: type, own: set[str]) -> None:
    """What is left is trained and evaluated as with them."""
    reports = []
    for baselines in (True, False):
        torch.manual_seed(0)
        probe = kind(checkpoint, num_classes=2, baselines=baselines)
        assert hasattr(probe, "untrained") == baselines
        run, data = trainer(tmp_path, max_epochs=1), small_images(image_root, val_fraction=0.4)
        run.fit(probe, data)
        run.test(probe, data, verbose=False)
        reports.append(json.loads((tmp_path / "report.json").read_text())["accuracy"])
    assert set(reports[1]) == own < set(reports[0])
    assert reports[1] == {name: reports[0][name] for name in own}
    table = (tmp_path / "report.md").read_text()
    assert "randomly initialized" not in table and "| pixels" not in table


def test_features_of_the_last_blocks(checkpoint: str) -> None:
    probe = LinearProbe(checkpoint, num_classes=2).eval()
    images = torch.randn(2, 3, 16, 16)
    features = probe.features(images)
    torch.testing.assert_close(features["last"], probe.encoder(images).mean(dim=1))
    assert features["last_four"].shape == (2, 4 * 192) and features["pixels"].shape == (2, 3 * 16 * 16)
    torch.testing.assert_close(features["last_four"][:, -192:], features["last"])
    assert not torch.allclose(features["last"], features["untrained_last"])


def test_the_half_that_chooses_is_not_the_half_that_is_reported() -> None:
    metric = HalvesAccuracy(2)
    labels = torch.zeros(4, dtype=torch.int64)
    # The first classifier is right on samples 0 and 2 alone, the second on 1 and 3.
    metric.update(torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0]]), labels)
    accuracies, seen = metric.compute()
    assert accuracies.tolist() == [[1, 0], [0, 1]] and seen.tolist() == [2, 2]


def test_impossible_probes_are_refused(tmp_path: Path, image_root: Path, checkpoint: str) -> None:
    with pytest.raises(ValueError, match="model.num_classes=1"):
        LinearProbe(checkpoint, num_classes=1)
    with pytest.raises(ValueError, match="model.learning_rates="):
        LinearProbe(checkpoint, learning_rates=())
    with pytest.raises(FileNotFoundError, match="No checkpoint at"):
        LinearProbe(str(tmp_path / "none.ckpt"))
    with pytest.raises(ValueError, match="model.num_classes=3 but the data has 2 classes"):
        trainer(tmp_path, max_steps=1).fit(LinearProbe(checkpoint, num_classes=3), small_images(image_root))
    run = trainer(tmp_path, max_steps=1, enable_checkpointing=True)
    run.fit(small_model(), small_data())
    run.save_checkpoint(tmp_path / "pendulum.ckpt")
    with pytest.raises(ValueError, match="holds a PendulumJEPA; this probe reads an IJEPA"):
        LinearProbe(str(tmp_path / "pendulum.ckpt"))


def test_classes_that_cannot_be_told_apart_are_refused(tmp_path: Path, image_root: Path) -> None:
    run = trainer(tmp_path)
    run.strategy.connect(small_ijepa())
    run.save_checkpoint(tmp_path / "jepa.ckpt")
    write_images(tmp_path / "one" / "alone", 6, size=(16, 16))
    write_images(tmp_path / "flat", 6, size=(16, 16))
    both = MultiTask({"insects": small_images(image_root), "others": small_images(image_root)})
    for probe in (LinearProbe, AttentiveProbe, KNNProbe):
        for data, said in (
            (small_images(tmp_path / "one"), "has one class alone"),
            (small_images(tmp_path / "flat"), "flat has no folders of classes"),
            (both, "learns one task, and the data has insects, others"),
        ):
            with pytest.raises(ValueError, match=said):
                trainer(tmp_path).test(probe(str(tmp_path / "jepa.ckpt")), data)
