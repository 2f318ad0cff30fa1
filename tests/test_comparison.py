"""The comparison of encoders: with labels, without, and with weights from elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import run_script, small_ijepa, small_images, trainer, write_images
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

import jepa_lightning.probes.images.comparison as comparison
from datamodules.pixel_format import PixelFormat
from datamodules.preprocessing import denormalize, normalize
from datamodules.rng import seeded_generator
from jepa_lightning import load
from jepa_lightning.cli import main
from jepa_lightning.probes import ComparisonProbe, KNNProbe, RidgeProbe
from jepa_lightning.probes.images.comparison import augmented_twice, bars, found_again
from jepa_lightning.probes.images.retrieval import average_precisions
from jepa_lightning.weights.exporting import export_weights


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of 40 images that differ a little."""
    for name, hue in (("ant", 0), ("bee", 3)):
        write_images(tmp_path / "images" / name, 40, size=(16, 16), hue=hue)
    return tmp_path / "images"


@pytest.fixture
def checkpoint(tmp_path: Path, images: Path) -> str:
    run = trainer(tmp_path, max_steps=1)
    run.fit(small_ijepa(encoder_depth=2), small_images(images))
    run.save_checkpoint(tmp_path / "a.ckpt")
    return str(tmp_path / "a.ckpt")


def compare(checkpoint: str, images: Path, root: Path, others: list[str] | None = None, **data: Any) -> dict[str, Any]:
    run = trainer(root, limit_test_batches=1.0)
    run.test(ComparisonProbe(checkpoint, others), small_images(images, **data), verbose=False)
    return json.loads((root / "report.json").read_text())


def test_figures_are_those_of_the_other_probes(checkpoint: str, images: Path, tmp_path: Path) -> None:
    figures = compare(checkpoint, images, tmp_path / "all")["comparison"]
    assert set(figures) == {"jepa", "untrained", "pixels"}
    alone = {}
    for name, probe in (("ridge", RidgeProbe(checkpoint)), ("knn", KNNProbe(checkpoint))):
        trainer(tmp_path / name, limit_test_batches=1.0).test(probe, small_images(images), verbose=False)
        alone[name] = json.loads((tmp_path / name / "report.json").read_text())["accuracy"]
    pairs = {"jepa": ("last_four", "features"), "untrained": ("untrained_last_four", "untrained"), "pixels": ("pixels",) * 2}
    for name, (linear, knn) in pairs.items():
        assert figures[name]["linear"] == pytest.approx(alone["ridge"][linear]["accuracy"]), name
        assert figures[name]["linear_standard_error"] == pytest.approx(alone["ridge"][linear]["standard_error"]), name
        assert figures[name]["knn"] == pytest.approx(alone["knn"][knn]["accuracy"]), name
    data, model = small_images(images), load(checkpoint)
    data.setup("test")
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]
    with torch.no_grad():
        embeddings = torch.cat([model(batch.images) for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    expected = average_precisions(embeddings, labels)
    assert figures["jepa"]["retrieval"] == pytest.approx(float(expected.mean()), abs=1e-5)
    assert figures["jepa"]["retrieval_standard_error"] == pytest.approx(float(expected.std()) / 16**0.5, abs=1e-5)
    text = (tmp_path / "all" / "report.md").read_text()
    assert "| random initialization | " in text and "chance 0.0625" in text
    for figure in ("comparison", "gallery"):
        with Image.open(tmp_path / "all" / f"{figure}.png") as image:
            assert image.size[0] > 300


def test_without_labels_images_are_to_be_found_again(checkpoint: str, tmp_path: Path) -> None:
    write_images(tmp_path / "flat", 30)
    report = compare(checkpoint, tmp_path / "flat", tmp_path / "out")
    assert set(report["comparison"]["jepa"]) == {"consistency", "consistency_standard_error"}
    assert report["num_pairs"] == 6 and report["chance_consistency"] == pytest.approx(1 / 6)
    again = compare(checkpoint, tmp_path / "flat", tmp_path / "again", batch_size=3)["comparison"]
    assert set(again) == set(report["comparison"])


def test_one_folder_of_images_is_no_class(checkpoint: str, tmp_path: Path) -> None:
    write_images(tmp_path / "one" / "all", 30)
    assert "linear" not in compare(checkpoint, tmp_path / "one", tmp_path / "out")["comparison"]["jepa"]


def test_no_more_pairs_than_asked_for(
    checkpoint: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "MAX_PAIRS", 5)
    report = compare(checkpoint, images, tmp_path / "out")
    assert report["num_pairs"] == 5 and report["num_images"] == 16


def test_weights_from_elsewhere_see_images_as_they_were_trained(checkpoint: str, images: Path, tmp_path: Path) -> None:
    export_weights(checkpoint, str(tmp_path / "timm"), "timm")
    run = trainer(tmp_path, max_steps=1)
    run.fit(small_ijepa(encoder_depth=2, image_size=32), small_images(images, image_size=32, normalization="found"))
    run.save_checkpoint(tmp_path / "b.ckpt")
    others = [str(tmp_path / "timm"), str(tmp_path / "b.ckpt")]
    figures = compare(checkpoint, images, tmp_path / "out", others=others)["comparison"]
    assert figures["other_0"] == figures["jepa"], "the same weights"
    probe = ComparisonProbe(checkpoint, others)
    probe.others["other_1"] = probe.others["other_1"].resized((16, 16))  # type: ignore[operator]  # as `setup` does
    probe._sizes["other_1"] = (16, 16)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    theirs = probe._pixels["other_1"]
    assert theirs != PixelFormat()
    direct = probe.others["other_1"].last_blocks(normalize(pixels, theirs), 4)  # type: ignore[operator]
    found = probe.features(normalize(pixels))["other_1"]
    torch.testing.assert_close(found[:, -192:], direct[-1].mean(dim=1), atol=1e-5, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in probe.others.parameters())
    probe.train()
    assert not probe.others["other_0"].training
    own = ComparisonProbe(checkpoint, [others[0]], baselines=False)
    assert list(own.names) == ["jepa", "other_0"]


@pytest.mark.parametrize(("name", "sizes"), [("test_vit3", [96] * 4), ("test_resnet", [32, 48, 192, 96])])
def test_any_model_of_timm_is_compared_with(
    name: str, sizes: list[int], checkpoint: str, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a class token and learned positions, or convolutional; at its own size and in its own normalization."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained_cfg_overlay={"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}).eval()
    timm.models.save_for_hf(model, tmp_path / "timm", safe_serialization=name == "test_vit3")
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        report = compare(checkpoint, images, tmp_path / "out", others=[str(tmp_path / "timm")])
    side = model.pretrained_cfg["input_size"][1]
    assert f"timm sees the images of (16, 16) resized to ({side}, {side})" in caplog.text
    assert set(report["comparison"]["other_0"]) == set(report["comparison"]["jepa"])
    probe = ComparisonProbe(checkpoint, [str(tmp_path / "timm")])
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    found = probe.features(normalize(pixels))["other_0"]
    assert found.shape == (2, sum(sizes)) and probe.last("other_0", found).shape == (2, sizes[-1])
    larger = vision.resize(pixels, [side, side]).float() / 255
    seen = (larger - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    with torch.no_grad():
        tokens = model.forward_features(seen)
    expected = tokens[:, 1:].mean(dim=1) if tokens.ndim == 3 else tokens.mean(dim=(2, 3))
    torch.testing.assert_close(probe.last("other_0", found), expected, rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in probe.others.parameters())


def test_a_folder_that_timm_cannot_read_says_why(checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "config.json").write_text('{"architecture": "vit_of_nobody"}')
    with pytest.raises(ValueError, match=r"timm cannot be read as a model of timm \(RuntimeError: .*vit_of_nobody"):
        ComparisonProbe(checkpoint, [str(tmp_path / "timm")])


def test_other_channels_are_refused(checkpoint: str, tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.strategy.connect(small_ijepa(channels=1))
    run.save_checkpoint(tmp_path / "gray.ckpt", weights_only=True)
    with pytest.raises(ValueError, match=r"gray.ckpt: give .* for images of 3 channels"):
        ComparisonProbe(checkpoint, [str(tmp_path / "gray.ckpt")])


def test_views_are_two_changes_of_one_image() -> None:
    images = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    state = torch.get_rng_state()
    first, second = augmented_twice(images, seeded_generator(1))
    again, _ = augmented_twice(images, seeded_generator(1))
    assert torch.equal(first, again) and not torch.equal(first, second) and torch.equal(state, torch.get_rng_state())
    assert first.shape == second.shape == images.shape and first.dtype == torch.uint8
    gray = augmented_twice(images[:, :1], seeded_generator(1))
    assert gray[0].shape == (4, 1, 16, 16)


def test_an_image_is_found_again_if_its_second_view_is_nearest() -> None:
    features = torch.eye(5)
    assert found_again(features, features).all()
    assert not found_again(features, features.roll(1, 0)).any()
    swapped = features[[1, 0, 2, 3, 4]]
    assert found_again(features, swapped).tolist() == [False, False, True, True, True]
    shifted = features + 100
    assert found_again(features, shifted).all(), "means do not count"


def test_an_embedding_that_survives_augmentation_is_told_from_one_that_does_not(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of one color each, in gray so that colors cannot be changed: their mean finds them, noise does not."""
    for number in range(40):
        (tmp_path / "flat").mkdir(exist_ok=True)
        Image.new("L", (16, 16), number * 6).save(tmp_path / "flat" / f"{number:02d}.png")
    monkeypatch.setattr(comparison.v2, "ColorJitter", lambda *_: comparison.v2.Identity())
    noise = torch.Generator().manual_seed(0)

    def pooled(encoder: torch.nn.Module, images: Tensor) -> Tensor:
        level = denormalize(images).float().mean(dim=(1, 2, 3))
        if encoder is probe.untrained:
            return torch.randn(len(images), 192, generator=noise)
        return torch.nn.functional.one_hot((level / 6).round().long(), 192).float()

    monkeypatch.setattr(comparison, "_pooled", pooled)
    probe = ComparisonProbe(checkpoint)
    trainer(tmp_path / "out", limit_test_batches=1.0).test(probe, small_images(tmp_path / "flat"), verbose=False)
    figures = json.loads((tmp_path / "out" / "report.json").read_text())["comparison"]
    assert figures["jepa"]["consistency"] == 1 and figures["untrained"]["consistency"] < 0.6


def test_bars_have_a_place_for_each_encoder() -> None:
    figures = {name: {"linear": 0.5, "linear_standard_error": 0.1} for name in ("jepa", "other_0")}
    axis = bars(figures, {"jepa": "JEPA", "other_0": "some/folder/vit.pth"}, ["linear"]).axes[0]
    assert len(axis.patches) == 2 and [text.get_text() for text in axis.get_legend().get_texts()] == ["JEPA", "vit.pth"]


TWO = """
import sys
from pathlib import Path
from conftest import small_images, trainer
from jepa_lightning.probes import ComparisonProbe

out, checkpoint, images = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
run = trainer(out, devices=2, strategy="ddp", limit_test_batches=1.0)
run.test(ComparisonProbe(checkpoint), small_images(images, batch_size=3), verbose=False)
"""


def test_two_processes_report_what_one_does(checkpoint: str, images: Path, tmp_path: Path) -> None:
    run_script(TWO, tmp_path / "two", checkpoint, str(images))
    found = [
        compare(checkpoint, images, tmp_path / "one", batch_size=3),
        json.loads((tmp_path / "two" / "report.json").read_text()),
    ]
    for name, figures in found[0]["comparison"].items():
        for kind in ("linear", "knn"):
            assert figures[kind] == pytest.approx(found[1]["comparison"][name][kind]), (name, kind)
    assert found[0]["num_pairs"] == found[1]["num_pairs"] == 16


def test_the_command_line_compares(checkpoint: str, images: Path, tmp_path: Path) -> None:
    arguments = ["--config", "probes/comparison", f"--model.checkpoint={checkpoint}", "--data=ImageFolder"]
    arguments = ["test", "--data=ImageFolder", *arguments[:3], f"--data.root={images}", "--data.image_size=16"]
    main([*arguments, "--data.num_workers=0", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path / 'out'}"])
    assert "Made by `python -m jepa_lightning" in (tmp_path / "out" / "report.md").read_text()
