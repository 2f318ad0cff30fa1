"""Pre-trained here, probed there: other images, other classes, another size."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_ijepa, small_images, trainer, write_images
from torchvision.transforms.v2 import functional as vision

from datamodules.preprocessing import normalize
from jepa_lightning import load
from jepa_lightning.cli import main
from jepa_lightning.probes import (
    AttentiveProbe,
    ComparisonProbe,
    CompletionProbe,
    FineTuning,
    KNNProbe,
    LinearProbe,
    RidgeProbe,
)
from jepa_lightning.weights.exporting import export_weights


@pytest.fixture
def checkpoint(tmp_path: Path, image_root: Path) -> str:
    """Of an I-JEPA on images of 16 pixels and two classes."""
    run = trainer(tmp_path, max_steps=1)
    run.fit(small_ijepa(encoder_depth=2), small_images(image_root))
    run.save_checkpoint(tmp_path / "ijepa.ckpt")
    return str(tmp_path / "ijepa.ckpt")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Images of 40 x 24 pixels in three classes."""
    for name, hue in (("ant", 0), ("bee", 2), ("cow", 4)):
        write_images(tmp_path / "elsewhere" / name, 12, size=(40, 24), hue=hue)
    return tmp_path / "elsewhere"


@pytest.mark.parametrize("kind", [LinearProbe, AttentiveProbe, FineTuning])
def test_what_is_fitted_stays_at_another_size(kind: type, checkpoint: str) -> None:
    baselines = {"baselines": False} if kind is LinearProbe else {}
    probe = kind(checkpoint, num_classes=3, **baselines).eval()
    before = {name: (value.clone(), value.requires_grad) for name, value in probe.state_dict(keep_vars=True).items()}
    probe.set_size((24, 40))
    after = probe.state_dict(keep_vars=True)
    assert before.keys() == after.keys()
    for name, (value, trained) in before.items():
        assert torch.equal(value, after[name]) and after[name].requires_grad == trained, name
    if kind is FineTuning:
        assert probe.networks["finetuned"].encoder is probe.encoder and probe.encoder.grid == (6, 10)
        assert probe.networks["scratch"](torch.randn(2, 3, 24, 40)).shape == (2, 3)
    else:
        assert probe.logits(torch.randn(2, 3, 24, 40)).shape[::2] == (2, 3)


def test_the_baseline_on_small_pixels_is_built_for_the_size_once(checkpoint: str) -> None:
    probe = LinearProbe(checkpoint, num_classes=3).eval()
    assert probe.heads["pixels_0"].in_features == 3 * 16 * 16
    probe.set_size((24, 40))
    assert probe.heads["pixels_0"].in_features == probe.norms["pixels"].num_features == 3 * 24 * 32
    probe.fitted.fill_(True)
    heads = probe.heads
    probe.set_size((16, 16))
    assert probe.heads is heads, "what is fitted is not thrown away"


def test_a_probe_that_was_fitted_at_another_size_says_so(checkpoint: str, elsewhere: Path, tmp_path: Path) -> None:
    for kind, settings in ((LinearProbe, {"baselines": True}), (AttentiveProbe, {})):
        run = trainer(tmp_path, max_steps=1)
        run.fit(kind(checkpoint, **settings), small_images(elsewhere, image_size=(24, 40)))
        run.save_checkpoint(tmp_path / "probe.ckpt")
        again, data = trainer(tmp_path / "again"), small_images(elsewhere, image_size=(16, 16))
        warned = pytest.warns(UserWarning, match=r"fitted on images of \(24, 40\) pixels and reads \(16, 16\) now")
        refused = pytest.raises(ValueError, match=r"fitted to images of \(24, 40\) pixels, and the data's have \(16, 16\)")
        with warned, refused if kind is LinearProbe else nullcontext():
            again.test(kind(checkpoint, **settings), data, ckpt_path=str(tmp_path / "probe.ckpt"), weights_only=False)


def test_positions_are_those_of_training_again_at_their_size(checkpoint: str) -> None:
    probe = KNNProbe(checkpoint)
    before = probe.encoder.positions.clone()
    probe.set_size((32, 32))
    larger = probe.encoder.positions.clone()
    probe.set_size((8, 8))
    probe.set_size((32, 32))
    assert torch.equal(probe.encoder.positions, larger), "not stretched twice"
    probe.set_size((16, 16))
    assert torch.equal(probe.encoder.positions, before)


def test_other_encoders_are_stretched_once(
    checkpoint: str, elsewhere: Path, tmp_path: Path, image_root: Path, caplog: Any
) -> None:
    other = small_ijepa(image_size=48, patch_size=8)
    run = trainer(tmp_path / "other", max_steps=1)
    run.fit(other, small_images(image_root, image_size=48))
    run.save_checkpoint(tmp_path / "other.ckpt")
    probe = ComparisonProbe(checkpoint, [str(tmp_path / "other.ckpt")])
    run = trainer(tmp_path / "probe", limit_test_batches=1.0)
    run.test(probe, small_images(elsewhere, image_size=48), verbose=False)
    assert torch.equal(probe.others["other_0"].positions, other.target_encoder.positions), "48 is its own size"
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):  # its patches of 8 pixels do not tile 20
        probe = ComparisonProbe(checkpoint, [str(tmp_path / "other.ckpt")])
        run.test(probe, small_images(elsewhere, image_size=20), verbose=False)
    assert "other.ckpt sees the images of (20, 20) resized to (48, 48)" in caplog.text
    images = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8)
    larger = normalize(vision.resize(images, [48, 48]))
    expected = [block.mean(dim=1) for block in other.target_encoder.last_blocks(larger, 4)]
    found = probe.features(normalize(images))["other_0"]
    torch.testing.assert_close(found, torch.cat(expected, dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [LinearProbe, AttentiveProbe, FineTuning, RidgeProbe, KNNProbe, ComparisonProbe])
def test_probes_read_images_of_another_size(kind: type, checkpoint: str, elsewhere: Path, tmp_path: Path) -> None:
    others = {}
    if kind is ComparisonProbe:
        export_weights(checkpoint, str(tmp_path / "timm"), "timm")
        others = {"others": [str(tmp_path / "timm")]}
    probe = kind(checkpoint, **others)
    encoder = probe.encoder.resized((24, 40)).eval()
    data = small_images(elsewhere, image_size=(24, 40), val_fraction=0.25)
    run = trainer(tmp_path / "probe", max_epochs=2, limit_test_batches=1.0, limit_val_batches=1.0)
    if probe.needs_fit:
        run.fit(probe, data)
        run.save_checkpoint(tmp_path / "probe.ckpt")
    run.test(probe, data, verbose=False)
    text = (tmp_path / "probe" / "report.md").read_text()
    assert kind is ComparisonProbe or "Images of 24 x 40 pixels." in text
    assert probe.image_size == (24, 40) and probe.encoder.grid == probe.untrained.grid == (6, 10)
    report = json.loads((tmp_path / "probe" / "report.json").read_text())
    images = torch.randn(2, 3, 24, 40)
    if kind is not FineTuning:
        assert torch.equal(probe.encoder(images), encoder(images)), "positions are stretched, weights stay"
    if kind is ComparisonProbe:
        assert torch.equal(probe.others["other_0"](images), encoder(images))
    if probe.needs_fit:  # in Python, without data
        again = load(tmp_path / "probe.ckpt")
        assert again.image_size == (24, 40)
        assert torch.equal(again.encoder(images), probe.eval().encoder(images))
        states = probe.state_dict()
        assert all(torch.equal(value, states[name]) for name, value in again.state_dict().items())
        resumed = kind(checkpoint)
        run = trainer(tmp_path / "again", limit_test_batches=1.0)
        run.test(resumed, data, ckpt_path=str(tmp_path / "probe.ckpt"), verbose=False, weights_only=False)
        again = json.loads((tmp_path / "again" / "report.json").read_text())
        assert again["accuracy"] == report["accuracy"]


def test_a_predictor_takes_no_other_size(checkpoint: str, elsewhere: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"images of \(16, 16\) pixels, and data.image_size=\(24, 40\): CompletionProbe"):
        trainer(tmp_path, max_steps=1).fit(CompletionProbe(checkpoint), small_images(elsewhere, image_size=(24, 40)))
    with pytest.raises(ValueError, match="multiple of patch_size=4"):
        trainer(tmp_path).test(KNNProbe(checkpoint), small_images(elsewhere, image_size=(22, 40)))


def test_by_one_configuration(checkpoint: str, elsewhere: Path, tmp_path: Path) -> None:
    root = f"--trainer.default_root_dir={tmp_path / 'ridge'}"
    data = ["--data", "ImageFolder", f"--data.root={elsewhere}", "--data.image_size=[24,40]", "--data.num_workers=0"]
    main(["test", "--config", "configs/probes/ridge.yaml", f"--model.checkpoint={checkpoint}", *data, root])
    report = json.loads((tmp_path / "ridge" / "report.json").read_text())
    assert report["accuracy"]["last_four"]["accuracy"] > 0.5, "three classes that differ in color"
    tuned = f"--trainer.default_root_dir={tmp_path / 'tuned'}"
    tune = ["--config", "configs/probes/finetuning.yaml", f"--model.checkpoint={checkpoint}", *data, tuned]
    tune += [
        "--data.batch_size=4",
        "--data.fraction=1",
        "--trainer.precision=32-true",
        "--trainer.enable_progress_bar=false",
    ]
    main(["fit", *tune, "--trainer.max_epochs=1"])
    main(["test", *tune, "--ckpt_path=last"])
    report = json.loads((tmp_path / "tuned" / "report.json").read_text())
    assert report["accuracy"]["finetuned"]["accuracy"] > 0.5 and report["image_size"] == [24, 40]
