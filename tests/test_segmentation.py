"""Segmentation: pairs of images and masks, heads on frozen patch embeddings, and what intersection over union is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import parameters_equal, run_script, small_ijepa, trainer
from lightning.pytorch import Callback
from PIL import Image
from torchmetrics.classification import MulticlassJaccardIndex

from datamodules import SegmentationFolder
from datamodules.batches import VOID
from datamodules.segmentation_folder import read_mask
from jepa_lightning.cli import main
from jepa_lightning.intersection_over_union import (
    ImageConfusions,
    bootstrapped,
    intersection_over_union,
    mean_iou,
)
from jepa_lightning.networks.vit import ViTEncoder
from jepa_lightning.probes import SegmentationProbe
from jepa_lightning.probes.images.segmentation import class_colors, pixel_loss, segmentation_report
from jepa_lightning.weights.checkpoints import load_probe
from jepa_lightning.weights.exporting import export_weights


def draw(folder: Path, count: int, size: tuple[int, int] = (24, 32), seed: int = 0) -> None:
    """A bright square (class 2) on a dark ground (class 0) below a sky (class 1); a frame of void."""
    generator = np.random.default_rng(seed)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        mask = np.zeros(size, np.uint8)
        mask[: size[0] // 3] = 1
        top, left = generator.integers(8, size[0] - 8), generator.integers(0, size[1] - 8)
        mask[top : top + 8, left : left + 8] = 2
        colors = np.array([[40, 60, 40], [120, 150, 220], [220, 200, 60]])
        image = colors[mask] + generator.integers(-20, 20, (*size, 3))
        mask[-1] = 255
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{number:02d}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number:02d}.png")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    draw(root / "train", 12)
    draw(root / "val", 5, seed=1)
    return root


def small_scenes(root: Path, **changes: Any) -> SegmentationFolder:
    return SegmentationFolder(**({"root": str(root), "image_size": (24, 32), "batch_size": 4, "num_workers": 0} | changes))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A JEPA of 16 x 16 pixels, untrained."""
    run, folder = trainer(tmp_path_factory.mktemp("jepa")), tmp_path_factory.mktemp("checkpoint")
    run.strategy.connect(small_ijepa(encoder_depth=2))
    run.save_checkpoint(folder / "a.ckpt", weights_only=True)
    return str(folder / "a.ckpt")


def test_masks_are_read_as_they_are(tmp_path: Path) -> None:
    values = np.array([[0, 3, 255], [11, 2, 1]], np.uint8)
    Image.fromarray(values).save(tmp_path / "gray.png")
    palette = Image.fromarray(values)
    palette.putpalette(list(range(256)) * 3)
    palette.save(tmp_path / "palette.png")
    Image.fromarray(values.astype(np.uint16) * 2).save(tmp_path / "deep.png")
    Image.fromarray(values > 2).save(tmp_path / "bits.png")
    for name in ("gray", "palette"):
        assert read_mask(tmp_path / f"{name}.png").tolist() == values.tolist()
        assert read_mask(tmp_path / f"{name}.png", 255).tolist() == [[0, 3, VOID], [11, 2, 1]]
    assert read_mask(tmp_path / "deep.png").tolist() == (values.astype(int) * 2).tolist()
    assert read_mask(tmp_path / "bits.png").tolist() == (values > 2).astype(int).tolist()
    Image.new("RGB", (3, 3)).save(tmp_path / "color.png")
    Image.new("F", (3, 3)).save(tmp_path / "float.tif")
    for name in ("color.png", "float.tif"):
        with pytest.raises(ValueError, match="write the index of the class of each pixel"):
            read_mask(tmp_path / name)


def test_pairs_are_cut_and_flipped_together(scenes: Path) -> None:
    data = small_scenes(scenes, crop_scale=(0.3, 0.6))
    data.setup("fit")
    assert data.num_classes == 3
    first, again = (next(iter(data.train_dataloader())) for _ in range(2))
    assert torch.equal(first.images, again.images) and torch.equal(first.masks, again.masks)
    assert first.images.shape == (4, 3, 24, 32) and first.masks.shape == (4, 24, 32) and first.masks.dtype == torch.int64
    bright = first.images.float().mean(dim=1)
    seen = (first.masks == 2).any(dim=2).any(dim=1)
    assert seen.any()
    for image, mask in zip(bright[seen], first.masks[seen], strict=True):
        assert image[mask == 2].mean() > image[mask == 0].mean() + 60 if (mask == 0).any() else True
    batches = list(data.val_dataloader())
    assert sum(len(batch.masks) for batch in batches) == 5
    first_image, first_mask = (Path(paths[0].decode()) for paths in (data._pairs["val"][0].paths, data._pairs["val"][1]))
    assert first_image.stem == first_mask.stem
    with Image.open(first_mask) as file:
        truth = torch.from_numpy(np.array(file)).long()
    assert torch.equal(batches[0].masks[0], torch.where(truth == 255, VOID, truth))
    floats = data.on_after_batch_transfer(batches[0], 0)
    assert floats.images.is_floating_point() and torch.equal(floats.masks, batches[0].masks)
    half = small_scenes(scenes, image_size=(12, 16))
    half.setup("fit")
    shrunk = next(iter(half.val_dataloader())).masks
    assert shrunk.shape[1:] == (12, 16) and set(shrunk.unique().tolist()) <= {VOID, 0, 1, 2}, "no class in between"


def test_pairs_that_do_not_fit_are_named(tmp_path: Path) -> None:
    draw(tmp_path / "train", 6)
    draw(tmp_path / "val", 3)
    (tmp_path / "train" / "masks" / "00.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 6 images have no mask in .*masks, first 00"):
        small_scenes(tmp_path).setup("fit")
    Image.new("L", (5, 5)).save(tmp_path / "train" / "masks" / "00.png")
    Image.new("L", (32, 24), 7).save(tmp_path / "val" / "masks" / "00.png")
    data = small_scenes(tmp_path, num_classes=3, crop_scale=(1.0, 1.0), batch_size=6)
    data.setup("fit")
    with pytest.warns(UserWarning, match=r"00.png cannot .*its mask has \(5, 5\) pixels, and the image \(24, 32\)"):
        assert len(next(iter(data.train_dataloader())).images) == 6, "another one stands in"
    with pytest.warns(UserWarning, match=r"00.png cannot be decoded .*its mask names class 7 of 3"):
        assert len(next(iter(data.val_dataloader())).images) == 2
    (tmp_path / "val" / "masks").rename(tmp_path / "val" / "labels")
    with pytest.raises(FileNotFoundError, match="masks"):
        small_scenes(tmp_path).setup("fit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "data.image_size=0"),
        ({"num_classes": 1}, "data.num_classes=1: segmentation needs at least 2"),
        ({"num_classes": 0}, "data.num_classes=0: segmentation needs at least 2"),
        ({"class_names": ["a", "b"]}, "data.class_names has 2 names, and there are 3 classes"),
        ({"flip": 2.0}, "data.flip=2.0"),
        ({"crop_scale": (0.5, 0.1)}, "data.crop_scale="),
    ],
)
def test_impossible_data_is_refused(scenes: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_scenes(scenes, **arguments).setup("fit")


@pytest.mark.parametrize("num_classes", [None, 2])
def test_masks_of_black_and_white_are_not_taken_for_void(tmp_path: Path, num_classes: int | None) -> None:
    for split in ("train", "val"):
        draw(tmp_path / split, 3)
        for path in (tmp_path / split / "masks").iterdir():
            with Image.open(path) as image:
                mask = np.array(image) == 2
            Image.fromarray((mask * 255).astype(np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"hold no class but 0, and data.void=255 does not count"):
        small_scenes(tmp_path, num_classes=num_classes).setup("fit")


def test_damaged_masks_and_other_files_end_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "val"):
        draw(tmp_path / split, 6)
    (tmp_path / "train" / "masks" / "00.png").write_bytes(b"no image")
    (tmp_path / "train" / "images" / "notes.txt").write_text("")
    (tmp_path / "train" / "images" / "more").mkdir()
    (tmp_path / "train" / "masks" / "more").mkdir()
    for part in ("images", "masks"):
        (tmp_path / "train" / part / "01.png").rename(tmp_path / "train" / part / "more" / "01.png")
    data = small_scenes(tmp_path, batch_size=6)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        data.setup("fit")
    assert data.num_classes == 3 and len(data._pairs["train"][1]) == 6, "also those below"
    assert "1 files of other kinds" in caplog.text
    with pytest.warns(UserWarning, match=r"00.png cannot be decoded"):
        next(iter(data.train_dataloader()))


def test_a_batch_of_void_alone_has_no_loss() -> None:
    logits, masks = torch.randn(2, 3, 4, 4), torch.full((2, 4, 4), VOID)
    assert pixel_loss(logits, masks) == 0
    masks[0, 0, 0] = 1
    assert pixel_loss(logits, masks) == -logits[0, :, 0, 0].log_softmax(dim=0)[1]


def test_iou_is_that_of_torchmetrics_and_void_does_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, truth = (torch.randint(0, 4, (6, 9, 10), generator=generator) for _ in range(2))
    truth[:, :2] = VOID
    metric, theirs = ImageConfusions(5), MulticlassJaccardIndex(5, average="none", ignore_index=VOID)
    for part in (slice(0, 2), slice(2, 6)):
        metric.update(predicted[part], truth[part])
        theirs.update(predicted[part], truth[part])
    matrices = metric.compute()
    assert matrices.shape == (6, 5, 5) and matrices.sum() == 6 * 7 * 10
    found = intersection_over_union(matrices.sum(dim=0))
    torch.testing.assert_close(found[:4].float(), theirs.compute()[:4])
    assert found[4].isnan(), "a class that is neither there nor predicted"
    assert mean_iou(matrices.sum(dim=0)) == found[:4].mean()
    perfect = torch.diag(torch.tensor([3, 4]))
    assert mean_iou(perfect) == 1 and mean_iou(perfect.flip(0)) == 0
    assert intersection_over_union(torch.tensor([[2, 1], [1, 0]])).tolist() == [0.5, 0.0]


def test_errors_are_those_over_images() -> None:
    sure, unsure = torch.tensor([[10, 0], [0, 10]]), torch.tensor([[5, 5], [5, 5]])
    same = torch.stack([sure] * 8)
    assert bootstrapped(same).std() == 0
    mixed = torch.stack([sure, unsure] * 50)
    drawn = bootstrapped(mixed)
    # The fraction p of sure images has a standard error of 0.05; IoU is (5 + 5 p) / (15 - 5 p).
    assert drawn.std() == pytest.approx(0.05 * 100 / 12.5**2, rel=0.1) and drawn.mean() == pytest.approx(0.6, abs=0.01)
    report = segmentation_report({"linear_last_four": mixed, "linear_colors": torch.stack([unsure] * 100)}, ["a", "b"])
    figures = report["segmentation"]["linear_colors"]
    assert figures["difference"] == pytest.approx(1 / 3 - 0.6) and figures["standard_error"] < 1e-9
    assert figures["difference_standard_error"] == pytest.approx(float(drawn.std())) and set(figures["iou"]) == {"a", "b"}
    both = segmentation_report({"linear_last_four": mixed, "conv_last_four": mixed}, ["a", "b"])["segmentation"]
    assert both["conv_last_four"]["difference_standard_error"] == 0, "on the same images"


def test_an_encoder_takes_images_of_another_size() -> None:
    encoder = ViTEncoder("vit_tiny_patch16_224", (16, 16), 4, depth=2).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(encoder.resized((16, 16))(images), encoder(images))
    larger = encoder.resized((24, 32))
    assert larger(torch.randn(2, 3, 24, 32)).shape == (2, 48, 192) and larger.grid == (6, 8) and encoder.grid == (4, 4)
    # Stretched: what is at the same fraction of the image has nearly the same position.
    old, new = encoder.positions.view(4, 4, -1), encoder.resized((32, 32)).positions.view(8, 8, -1)
    blocks = new.view(4, 2, 4, 2, -1).mean(dim=(1, 3))
    assert (blocks[1:3, 1:3] - old[1:3, 1:3]).abs().max() < 0.15
    with pytest.raises(ValueError, match=r"Images of \(18, 16\) pixels are no multiple of patch_size=4"):
        encoder.resized((18, 16))


def fit(checkpoint: str, scenes: Path, root: Path, **changes: Any) -> tuple[SegmentationProbe, Path]:
    torch.manual_seed(0)
    probe = SegmentationProbe(checkpoint, learning_rate=1e-2)
    run = trainer(root, **({"max_epochs": 8, "limit_val_batches": 1.0, "enable_checkpointing": True} | changes))
    run.fit(probe, small_scenes(scenes))
    run.save_checkpoint(root / "probe.ckpt")
    return probe, root / "probe.ckpt"


def test_heads_learn_and_the_encoder_does_not(checkpoint: str, scenes: Path, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in SegmentationProbe(checkpoint).encoder.state_dict().items()}
    probe, path = fit(checkpoint, scenes, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in probe.encoder.state_dict().items())
    assert not probe.encoder.training and not any(p.requires_grad for p in probe.encoder.parameters())
    assert probe.image_size == (24, 32) and probe.encoder.grid == (6, 8)
    run = trainer(tmp_path / "test", limit_test_batches=1.0)
    run.test(SegmentationProbe(checkpoint), small_scenes(scenes, class_names=["ground", "sky", "square"]), ckpt_path=path)
    report = json.loads((tmp_path / "test" / "report.json").read_text())
    figures = report["segmentation"]
    assert set(figures) == set(probe.names) and report["num_images"] == 5
    assert figures["linear_last_four"]["miou"] > 0.5 and figures["linear_colors"]["iou"]["sky"] > 0.7
    text = (tmp_path / "test" / "report.md").read_text()
    assert "| square |" in text and "| linear, last four blocks |" in text
    with Image.open(tmp_path / "test" / "segmentation.png") as image:
        assert image.size[0] > 200
    again = load_probe(path, SegmentationProbe)
    images = torch.randn(2, 3, 24, 32)
    assert again.image_size == (24, 32)
    torch.testing.assert_close(again.logits(images)["conv_last_four"], probe.eval().logits(images)["conv_last_four"])


def test_features_are_laid_out_like_the_image(checkpoint: str) -> None:
    probe = SegmentationProbe(checkpoint, num_classes=3)
    probe.set_size((24, 32))
    images = torch.randn(2, 3, 24, 32)
    features = probe.features(images)
    patches = probe.encoder.last_blocks(images, 4)
    assert torch.equal(features["last"][1, :, 2, 5], patches[-1][1, 2 * 8 + 5])
    assert features["last_four"].shape == (2, 2 * 192, 6, 8) and features["untrained_last"].shape == (2, 192, 6, 8)
    colors = features["colors"]
    assert torch.equal(colors[1, :48, 2, 5], images[1, :, 8:12, 20:24].flatten())
    assert torch.equal(colors[1, 48:, 2, 5], probe.encoder.positions[2 * 8 + 5])
    assert probe.logits(images)["linear_last"].shape == (2, 3, 24, 32)
    alone = SegmentationProbe(checkpoint, num_classes=3, baselines=False)
    assert set(alone.heads) == {"linear_last", "linear_last_four", "conv_last_four"}


def test_void_pixels_have_no_gradient(checkpoint: str, scenes: Path) -> None:
    probe = SegmentationProbe(checkpoint, num_classes=3)
    probe.set_size((24, 32))
    probe.log = probe.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    data = small_scenes(scenes)
    data.setup("fit")
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    other = batch._replace(masks=torch.where(batch.masks == VOID, VOID, batch.masks))
    assert torch.equal(probe.training_step(batch, 0), probe.training_step(other, 0))
    counted = batch._replace(masks=batch.masks.clamp(min=0))
    assert not torch.equal(probe.training_step(batch, 0), probe.training_step(counted, 0))


def test_weights_of_timm_and_runs_are_read(checkpoint: str, scenes: Path, tmp_path: Path) -> None:
    export_weights(checkpoint, str(tmp_path / "timm"), "timm")
    export_weights(checkpoint, str(tmp_path / "official.pth.tar"), "official")
    own = SegmentationProbe(checkpoint)
    for weights in ("timm", "official.pth.tar"):
        probe, path = fit(str(tmp_path / weights), scenes, tmp_path / f"run {weights}", max_epochs=1, limit_train_batches=1)
        resized = own.encoder.resized((24, 32)).state_dict()
        assert all(torch.equal(value, resized[name]) for name, value in probe.encoder.state_dict().items())
        (tmp_path / weights).rename(tmp_path / f"gone {weights}")
        assert load_probe(path, SegmentationProbe).encoder.grid == (6, 8), "without the file of its weights"


def test_impossible_probes_are_refused(checkpoint: str) -> None:
    for arguments in ({"width": 0}, {"learning_rate": 0.0}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match="give a width of 1 or more"):
            SegmentationProbe(checkpoint, **arguments)


def test_colors_of_classes_differ_and_void_is_white() -> None:
    colors = class_colors(torch.tensor([[[0, 1, 2, VOID]]]))
    assert colors.shape == (1, 3, 1, 4) and (colors[0, :, 0, 3] == 1).all()
    assert len({tuple(colors[0, :, 0, place].tolist()) for place in range(4)}) == 4


def test_a_cut_run_goes_on_with_the_next_batch(checkpoint: str, scenes: Path, tmp_path: Path) -> None:
    class Seen(Callback):
        def __init__(self, cut: int) -> None:
            self.cut, self.means = cut, []

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.means.append(batch.images.mean(dim=(1, 2, 3)).tolist())
            if len(self.means) == self.cut:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    def fit(cut: int, path: Path | None = None) -> tuple[SegmentationProbe, list[list[float]]]:
        torch.manual_seed(0)
        probe, seen = SegmentationProbe(checkpoint), Seen(cut)
        trainer(tmp_path, max_epochs=3, callbacks=[seen]).fit(probe, small_scenes(scenes), ckpt_path=path, weights_only=True)
        return probe, seen.means

    whole, means = fit(4)  # the first batch of the second epoch of three batches
    rest, later = fit(-1, tmp_path / "cut.ckpt")
    assert len(means) == 9 and later == means[4:]
    assert parameters_equal(whole, rest)


TWO = """
import json
import sys
from pathlib import Path
import torch
from test_segmentation import small_scenes
from conftest import trainer
from lightning.pytorch import Callback
from jepa_lightning.probes import SegmentationProbe

class Seen(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        with open(out / f"seen {trainer.global_rank}", "a") as file:
            file.write(json.dumps(batch.images.mean(dim=(1, 2, 3)).tolist()) + chr(10))

    def on_fit_end(self, trainer, module):
        torch.save(dict(module.heads.named_parameters()), out / f"heads {trainer.global_rank}")

out, checkpoint, scenes = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
torch.manual_seed(0)
probe = SegmentationProbe(checkpoint, num_classes=3)
probe.needs_fit = False
run = trainer(out, devices=2, strategy="ddp", limit_test_batches=1.0)
run.test(probe, small_scenes(scenes, batch_size=2), verbose=False)
probe = SegmentationProbe(checkpoint, num_classes=3)
run = trainer(out, devices=2, strategy="ddp", max_epochs=1, callbacks=[Seen()])
run.fit(probe, small_scenes(scenes, batch_size=2, crop_scale=(1.0, 1.0), flip=0.0))
"""


def test_two_processes_train_on_and_evaluate_each_image_once(checkpoint: str, scenes: Path, tmp_path: Path) -> None:
    run_script(TWO, tmp_path / "two", checkpoint, str(scenes))
    torch.manual_seed(0)
    probe = SegmentationProbe(checkpoint, num_classes=3)
    probe.needs_fit = False
    trainer(tmp_path / "one", limit_test_batches=1.0).test(probe, small_scenes(scenes, batch_size=2), verbose=False)
    one, two = (json.loads((tmp_path / name / "report.json").read_text())["segmentation"] for name in ("one", "two"))
    for name, figures in one.items():
        assert figures["miou"] == pytest.approx(two[name]["miou"], abs=1e-6), name
    seen = [(tmp_path / "two" / f"seen {rank}").read_text().splitlines() for rank in range(2)]
    assert len(seen[0]) == len(seen[1]) == 3
    means = [mean for part in seen for line in part for mean in json.loads(line)]
    assert len(set(means)) == 12, "in training each of the 12 images once, by one of the two"
    heads = [torch.load(tmp_path / "two" / f"heads {rank}") for rank in range(2)]
    assert all(torch.equal(value, heads[1][name]) for name, value in heads[0].items())


def test_the_command_line_from_fit_to_report(checkpoint: str, scenes: Path, tmp_path: Path) -> None:
    few = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.accelerator=cpu"]
    arguments = ["--config", "probes/segmentation", f"--model.checkpoint={checkpoint}", f"--data.root={scenes}"]
    arguments += ["--data.image_size=[24,32]", "--data.batch_size=2", "--data.num_workers=0"]
    arguments += [f"--trainer.default_root_dir={tmp_path}", "--trainer.enable_progress_bar=false", *few]
    main(["fit", *arguments])
    main(["test", *arguments, "--ckpt_path=last"])
    assert "Made by `python -m jepa_lightning" in (tmp_path / "report.md").read_text()
