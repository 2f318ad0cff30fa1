"""Embeddings out: all files, in order, once each, by one process or two, in one go or in two."""

import csv
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    apart,
    run_here,
    run_script,
    small_data,
    small_ijepa,
    small_images,
    small_iwm,
    small_model,
    trainer,
    write_images,
)
from lightning.pytorch import Callback
from PIL import Image
from safetensors.torch import load_file

from callbacks import EmbeddingWriter
from datamodules.image_datasets import UnreadableImageWarning
from jepa_lightning import load
from jepa_lightning.cli import main
from jepa_lightning.weights.runs import run_directory

CPU = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two classes of 7 and 5 images of several sizes."""
    for name, count, size in (("ant", 7, (16, 16)), ("bee", 5, (20, 24))):
        write_images(tmp_path / "mixed" / name, count, size=size, hue=count)
    return tmp_path / "mixed"


def predict(model: Any, root: Path, folder: Path, *more: Callback, **arguments: Any) -> Path:
    run = trainer(root, callbacks=[EmbeddingWriter(projector=False, **arguments), *more])
    run.predict(model, small_images(folder, batch_size=4), return_predictions=False)
    return root / "predict" / folder.name


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "index.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def expected(model: Any, paths: list[Path]) -> torch.Tensor:
    found = []
    for path in paths:
        with Image.open(path) as image:
            found.append(model(model.transform(image)[None])[0])
    return torch.stack(found)


@pytest.mark.parametrize("make", [small_ijepa, small_iwm])
def test_all_files_in_order_with_their_classes(tmp_path: Path, mixed: Path, make: Any) -> None:
    model = make()
    apart(model)
    folder = predict(model, tmp_path, mixed)
    paths = sorted(mixed.rglob("*.jpg"))
    found = load_file(folder / "embeddings.safetensors")["embeddings"]
    assert [row["path"] for row in table(folder)] == [str(path) for path in paths]
    assert [row["label"] for row in table(folder)] == ["ant"] * 7 + ["bee"] * 5
    assert [row["row"] for row in table(folder)] == [str(row) for row in range(12)]
    torch.testing.assert_close(found, expected(model.eval(), paths), atol=0.05, rtol=0.05)  # another JPEG decoder
    assert (found[:, None] - found[None]).abs().sum(dim=-1).fill_diagonal_(1).min() > 0, "each another one"
    assert sorted(path.name for path in folder.iterdir()) == ["embeddings.safetensors", "index.csv", "source.json"]
    assert json.loads((folder / "source.json").read_text())["root"] == str(mixed)


def test_training_and_held_out_images_of_a_split_folder(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        write_images(tmp_path / "split" / split / "a", count, size=(16, 16))
    rows = table(predict(small_ijepa(), tmp_path, tmp_path / "split"))
    assert [Path(row["path"]).parts[-3] for row in rows] == ["train"] * 3 + ["val"] * 2


def test_patches_and_npz(tmp_path: Path, mixed: Path) -> None:
    model = small_ijepa()
    apart(model)
    folder = predict(model, tmp_path / "patches", mixed, patches=True, format="npz")
    found = np.load(folder / "embeddings.npz")
    assert found["patches"].shape == (12, 16, 192) and found["embeddings"].shape == (12, 192)
    np.testing.assert_allclose(found["patches"].astype(np.float32).mean(axis=1), found["embeddings"], atol=2e-3)
    alone = load_file(predict(model, tmp_path / "pooled", mixed) / "embeddings.safetensors")["embeddings"]
    np.testing.assert_allclose(alone, found["embeddings"], atol=1e-6)


def test_files_that_cannot_be_decoded_have_no_row(tmp_path: Path, mixed: Path) -> None:
    (mixed / "ant" / "0002.jpg").write_bytes(b"no image")
    with pytest.warns(UnreadableImageWarning, match=r"0002.jpg cannot be decoded"):
        folder = predict(small_ijepa(), tmp_path, mixed)
    rows = table(folder)
    assert len(rows) == 11 == len(load_file(folder / "embeddings.safetensors")["embeddings"])
    assert not any("0002.jpg" in row["path"] and "ant" in row["path"] for row in rows)


class Stop(Callback):
    """Cut a run after some batches, or count them."""

    def __init__(self, after: int | None = None) -> None:
        self.after, self.count = after, 0

    def on_predict_batch_end(self, *_: Any) -> None:
        self.count += 1
        if self.count == self.after:
            raise RuntimeError("cut")


def test_a_run_that_was_cut_goes_on(tmp_path: Path, mixed: Path) -> None:
    model = small_ijepa()
    whole = load_file(predict(model, tmp_path / "whole", mixed) / "embeddings.safetensors")["embeddings"]
    with pytest.raises(RuntimeError, match="cut"):
        predict(model, tmp_path, mixed, Stop(2))
    assert not (tmp_path / "predict" / "mixed" / "index.csv").exists()
    rest = Stop()
    folder = predict(model, tmp_path, mixed, rest)
    assert rest.count == 1, "8 of 12 were there"
    assert torch.equal(load_file(folder / "embeddings.safetensors")["embeddings"], whole) and len(table(folder)) == 12
    again = Stop()
    predict(model, tmp_path, mixed, again)
    assert again.count == 3, "what is complete is made anew when it is asked for again"
    with pytest.raises(RuntimeError, match="cut"):
        predict(model, tmp_path, mixed, Stop(2))
    write_images(mixed / "ant", 8, size=(16, 16))
    other = Stop()
    predict(model, tmp_path, mixed, other)
    assert other.count == 4, "other files, other rows"


PROCESSES = """
import sys
import torch
from conftest import small_ijepa, small_images, trainer
from callbacks import EmbeddingWriter

torch.set_num_threads(1)
out, devices, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
run = trainer(out, devices=devices, strategy="ddp" if devices > 1 else "auto", callbacks=[EmbeddingWriter(projector=False)])
run.predict(small_ijepa(), small_images(folder, batch_size=2), return_predictions=False)
"""


def test_two_processes_write_what_one_writes(tmp_path: Path, mixed: Path) -> None:
    write_images(mixed / "ant", 8, size=(16, 16))  # 13 files: one process has one more
    run_here(PROCESSES, tmp_path / "one", "1", str(mixed))
    run_script(PROCESSES, tmp_path / "two", "2", str(mixed))
    one, two = (tmp_path / name / "predict" / "mixed" for name in ("one", "two"))
    assert table(one) == table(two) and len(table(one)) == 13
    first, second = (load_file(folder / "embeddings.safetensors")["embeddings"] for folder in (one, two))
    torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-6)


def test_from_the_command_line_by_the_run_alone(tmp_path: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit = ["fit", "--model", "IJEPA", "--model.encoder", "vit_tiny_patch16_224", "--model.encoder_depth", "1", *CPU]
    fit += ["--model.image_size", "16", "--model.patch_size", "4", "--model.predictor_depth", "1", "--data", "ImageFolder"]
    fit += ["--data.root", str(mixed), "--data.image_size", "16", "--data.batch_size", "2", "--data.num_workers", "0"]
    main([*fit, "--trainer.max_steps", "1", "--trainer.default_root_dir", "run", "--data.val_fraction", "0.3"])
    assert run_directory("run") == Path("run")
    main(["predict", "--ckpt_path", "run", "--data.root", str(mixed), *CPU])
    folder = Path("run/predict/mixed")
    assert len(table(folder)) == 12
    torch.testing.assert_close(
        load_file(folder / "embeddings.safetensors")["embeddings"],
        expected(load("run"), sorted(mixed.rglob("*.jpg"))),
        atol=0.05,
        rtol=0.05,
    )
    assert list(Path("run").rglob("*sprite.png")), "thumbnails for the projector"
    Path("alone").mkdir()
    Path("run/checkpoints/last.ckpt").rename("alone/model.ckpt")
    main(["predict", "--ckpt_path", "alone/model.ckpt", "--data.root", str(mixed), "--data.num_workers", "0", *CPU])
    assert len(table(Path("runs/IJEPA/predict/mixed"))) == 12, "a checkpoint is enough"


def test_formats_are_named() -> None:
    with pytest.raises(ValueError, match="format='csv': choose 'safetensors' or 'npz'"):
        EmbeddingWriter(format="csv")
    assert small_model().embedding_dim > 0


def test_what_nobody_can_read_does_not_keep_a_cut_run_from_ending(tmp_path: Path, mixed: Path) -> None:
    (mixed / "bee" / "zzz.jpg").write_bytes(b"no image")
    with pytest.raises(RuntimeError, match="cut"):
        predict(small_ijepa(), tmp_path, mixed, Stop(3))
    with pytest.warns(UnreadableImageWarning):
        assert len(table(predict(small_ijepa(), tmp_path, mixed))) == 12


def test_a_cut_run_is_not_ended_with_other_weights(tmp_path: Path, mixed: Path) -> None:
    model, rest = small_ijepa(), Stop()
    with pytest.raises(RuntimeError, match="cut"):
        predict(model, tmp_path, mixed, Stop(2))
    with torch.no_grad():
        next(model.target_encoder.parameters()).add_(0.1)
    predict(model, tmp_path, mixed, rest)
    assert rest.count == 3, "all of them anew"


def test_a_failed_write_leaves_what_was_complete(tmp_path: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_ijepa()
    path = predict(model, tmp_path, mixed) / "embeddings.safetensors"
    before = path.read_bytes()

    def half(arrays: dict, to: Path) -> None:
        Path(to).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full_disk, pytest.raises(OSError, match="No space left"):
        full_disk.setattr("callbacks.embeddings.save_file", half)
        predict(model, tmp_path, mixed)
    assert path.read_bytes() == before
    rest = Stop()
    predict(model, tmp_path, mixed, rest)
    assert rest.count == 1 and path.read_bytes() == before, "all rows were kept: one is read again, so that there is a batch"


def test_a_limited_run_replaces_nothing(tmp_path: Path, mixed: Path) -> None:
    folder = predict(small_ijepa(), tmp_path, mixed)
    before = (folder / "embeddings.safetensors").read_bytes()
    limits = {"limit_predict_batches": pytest.warns(UserWarning, match="4 of 12 images have"), "fast_dev_run": nullcontext()}
    for limit, context in limits.items():
        run = trainer(tmp_path, callbacks=[EmbeddingWriter(projector=False)], **{limit: 1})
        with context:
            run.predict(small_ijepa(), small_images(mixed, batch_size=4), return_predictions=False)
    assert (folder / "embeddings.safetensors").read_bytes() == before and len(table(folder)) == 12


def test_two_folders_of_one_name_have_a_place_each(tmp_path: Path) -> None:
    for name, count in (("one", 3), ("two", 5)):
        write_images(tmp_path / name / "val" / "a", count, size=(16, 16))
    first = predict(small_ijepa(), tmp_path / "run", tmp_path / "one" / "val")
    predict(small_ijepa(), tmp_path / "run", tmp_path / "two" / "val")
    assert len(table(first)) == 3
    (second,) = set((tmp_path / "run" / "predict").iterdir()) - {first}
    assert len(table(second)) == 5 and second.name.startswith("val-")


def test_data_and_model_are_left_as_they_were(tmp_path: Path, mixed: Path) -> None:
    """One data module may predict, train, and predict again."""
    model, data = small_ijepa(), small_images(mixed, batch_size=4)
    writer = EmbeddingWriter(patches=True, projector=False)
    trainer(tmp_path, callbacks=[writer]).predict(model, data, return_predictions=False)
    assert data.predict_indices is None and model.predict_patches is False
    trainer(tmp_path, max_steps=1, limit_val_batches=1.0).fit(model, data)
    trainer(tmp_path).validate(model, data, verbose=False)
    assert torch.cat(trainer(tmp_path).predict(model, data)).shape == (12, 192)


def test_no_embeddings_without_weights_and_none_of_what_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["predict", "--config", "ijepa/cifar10_cpu", "--trainer.default_root_dir", str(tmp_path), *CPU])
    assert "predict needs trained weights: give --ckpt_path" in capsys.readouterr().err
    run = trainer(tmp_path, callbacks=[EmbeddingWriter()])
    with pytest.raises(ValueError, match="of folders of images, not of DoublePendulum"):
        run.predict(small_model(), small_data())


def test_sources_in_one_folder_are_told_apart(tmp_path: Path, mixed: Path) -> None:
    folders = []
    for name in ("", "one", "two", "one"):
        data, writer = small_images(mixed, batch_size=4), EmbeddingWriter(projector=False)
        data.source_name = name
        trainer(tmp_path, callbacks=[writer]).predict(small_ijepa(), data, return_predictions=False)
        folders.append(writer.folder)
    # A third one is put where the second was: what it is named after is another source, as source.json says.
    assert folders[0] != folders[1] == folders[3] != folders[2] != folders[0]
