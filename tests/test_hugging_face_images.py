"""Hugging Face data sets: on a disk and streamed, by one process and two, cut and resumed."""

import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import ROOT, parameters_equal, run_script, small_ijepa, small_iwm, trainer
from lightning.pytorch import Callback
from PIL import Image
from torch import Tensor

from datamodules import HuggingFaceImages, Views
from datamodules.hugging_face_source import library
from datamodules.image_stream import Record, StreamBatches, StreamedImages
from datamodules.pixel_format import PixelFormat
from datamodules.random_changes import random_change
from jepa_lightning.probes import ComparisonProbe, KNNProbe

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)  # 5 s after each stream of parquet files
    datasets.disable_progress_bars()


def png(value: int) -> bytes:
    """An image all of one value, which says which image it is."""
    content = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(content, "PNG")
    return content.getvalue()


def write(folder: Path, count: int = 48, shards: int = 4) -> Path:
    """Parquet and WebDataset shards of images 0 ... count - 1 to train on, and of six more."""
    folder.mkdir(parents=True, exist_ok=True)

    def table(numbers: range) -> Any:
        rows = {"image": [{"bytes": png(n), "path": None} for n in numbers], "label": [n % 3 for n in numbers]}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cat"])})
        return datasets.Dataset.from_dict(rows, features=features)

    def archive(path: Path, numbers: range) -> None:
        with tarfile.open(path, "w") as file:
            for number in numbers:
                for ending, content in (("png", png(number)), ("cls", str(number % 3).encode())):
                    info = tarfile.TarInfo(f"{number:04d}.{ending}")
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))

    train = table(range(count))
    for shard in range(shards):
        train.shard(shards, shard).to_parquet(folder / f"train-{shard}.parquet")
        archive(folder / f"train-{shard}.tar", range(shard * count // shards, (shard + 1) * count // shards))
    table(range(200, 206)).to_parquet(folder / "val.parquet")
    archive(folder / "val.tar", range(200, 206))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    datasets.disable_progress_bars()
    return write(tmp_path_factory.mktemp("shards"))


SMALL: dict[str, Any] = {"image_size": 16, "batch_size": 4, "num_workers": 0, "crop_scale": (1.0, 1.0)}


def on_disk(folder: Path, **changes: Any) -> HuggingFaceImages:
    files = {"train": str(folder / "train-*.parquet"), "val": str(folder / "val.parquet")}
    return HuggingFaceImages("parquet", data_files=files, **(SMALL | changes))


def streamed(folder: Path, kind: str = "parquet", **changes: Any) -> HuggingFaceImages:
    ending = "parquet" if kind == "parquet" else "tar"
    files = {"train": str(folder / f"train-*.{ending}"), "val": str(folder / f"val.{ending}")}
    settings = {"val_split": "val", "streaming": True, "size": 48, "shuffle_buffer": 7}
    return HuggingFaceImages(kind, data_files=files, **(SMALL | settings | changes))


def numbers(batch: Any) -> list[int]:
    """Which images a batch holds."""
    return batch.images.float().mean(dim=(1, 2, 3)).round().int().tolist()


def flat(parts: list[list[int]]) -> list[int]:
    return [number for part in parts for number in part]


def epoch(data: HuggingFaceImages, number: int = 0, first: int = 0) -> list[list[int]]:
    loader = data.make_train_loader()
    loader.sampler.set_epoch(number)
    loader.start_at(first)
    return [numbers(batch) for batch in loader]


def test_a_data_set_on_a_disk_is_like_a_folder(shards: Path) -> None:
    assert on_disk(shards, image_size=None).image_size == (32, 32), "found in the images: the smallest there is"
    data = on_disk(shards)
    data.prepare_data()
    data.setup("fit")
    assert data.classes == ["ant", "bee", "cat"] and data.num_classes == 3
    train, held_out = flat(epoch(data)), [n for batch in data.val_dataloader() for n in numbers(batch)]
    assert len(held_out) == 6 and sorted({*train, *held_out}) == sorted([*train, *held_out])
    batch = next(iter(data.val_dataloader()))
    assert batch.labels.tolist() == [n % 3 for n in numbers(batch)]
    assert epoch(data, 1) != epoch(data) == epoch(data) and epoch(data, 1, first=3) == epoch(data, 1)[3:]
    assert sorted(n for batch in data.plain_train_dataloader() for n in numbers(batch)) == sorted(
        set(range(48)) - set(held_out)
    )
    split = on_disk(shards, val_split="val", fraction=0.5)
    split.setup("fit")
    assert sorted(n for batch in split.val_dataloader() for n in numbers(batch)) == list(range(200, 206))
    assert len(split._samples["train"].labels) == 24


def test_a_saved_data_set_and_columns_by_name(tmp_path: Path) -> None:
    images = [{"bytes": png(n), "path": None} for n in range(20)]
    rows = {"photo": images, "what": ["x" if n % 2 else "y" for n in range(20)], "other": list(range(20))}
    made = datasets.Dataset.from_dict(rows).cast_column("photo", datasets.Image())
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "several")
    for name in ("one", "several"):
        data = HuggingFaceImages(str(tmp_path / name), label_column="what", **SMALL)
        data.setup("fit")
        assert data.classes == ["x", "y"] and len(data._samples["train"].labels) == 18
    plain = HuggingFaceImages(str(tmp_path / "one"), **SMALL)
    plain.setup("fit")
    assert plain.num_classes == 0
    for changes, message in (
        ({"image_column": "sketch"}, "data.image_column='sketch': .* has the columns photo, what, other"),
        ({"label_column": "class"}, "data.label_column='class': .* has the columns"),
    ):
        with pytest.raises(ValueError, match=message):
            HuggingFaceImages(str(tmp_path / "one"), **(SMALL | changes)).setup("fit")
    made.remove_columns(["photo"]).save_to_disk(tmp_path / "none")
    with pytest.raises(ValueError, match="data.image_column=None: .* has the columns what, other"):
        HuggingFaceImages(str(tmp_path / "none"), **SMALL).setup("fit")


def test_embedding_and_probing_work_as_on_a_folder(shards: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=2)
    run.fit(small_ijepa(), on_disk(shards))
    run.save_checkpoint(tmp_path / "a.ckpt")
    probed = trainer(tmp_path / "probe", limit_test_batches=1.0)
    probed.test(KNNProbe(str(tmp_path / "a.ckpt")), on_disk(shards), verbose=False)
    assert "knn" not in (report := json.loads((tmp_path / "probe" / "report.json").read_text())) and report["accuracy"]
    data = on_disk(shards)
    rows: Any = trainer(tmp_path, limit_predict_batches=1.0).predict(small_ijepa(), data)
    assert sum(len(part) for part in rows) == 48 and data.predict_files.paths[17] == b"train/17"
    assert data.root == shards, "the folder of the files names what is written"
    assert data.thumbnails([5], 8).mean() == pytest.approx(5 / 255, abs=1e-3)


@pytest.mark.parametrize("make", [on_disk, streamed])
def test_rand_augment_distorts_images(shards: Path, make: Callable[..., HuggingFaceImages]) -> None:
    def first_epoch(**changes: Any) -> Tensor:
        data = make(shards, **changes)
        data.setup("fit")
        return torch.cat([batch.images for batch in data.make_train_loader()])

    plain, distorted = first_epoch(), first_epoch(rand_augment=True)
    assert (plain.amax((1, 2, 3)) == plain.amin((1, 2, 3))).all(), "images of one value"
    changed = (plain != distorted).flatten(1).any(dim=1).float().mean()
    assert changed > 0.5 and torch.equal(distorted, first_epoch(rand_augment=True))


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_a_stream_has_each_image_once_in_an_epoch(shards: Path, kind: str) -> None:
    data = streamed(shards, kind)
    data.setup("fit")
    first, second = epoch(data), epoch(data, 1)
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(48))
    assert first != second and flat(first) != sorted(flat(first)) and epoch(data) == first
    assert epoch(data, 1, first=5) == second[5:], "taken up in the middle"
    assert epoch(streamed_with(data, num_workers=2), 1, first=5) == second[5:], "whatever the number of workers"
    assert sorted(n for batch in data.val_dataloader() for n in numbers(batch)) == list(range(200, 206))
    batch = next(iter(data.train_dataloader()))
    assert batch.labels.tolist() == [n % 3 for n in numbers(batch)]
    assert data.num_classes == (3 if kind == "parquet" else 0)


def streamed_with(data: HuggingFaceImages, **changes: Any) -> HuggingFaceImages:
    for name, value in changes.items():
        setattr(data, name, value)
    return data


def test_classes_of_the_held_out_split_are_those_of_training(tmp_path: Path) -> None:
    def saved(labels: list[Any]) -> Any:
        rows = {"image": [{"bytes": png(n), "path": None} for n in range(len(labels))], "label": labels}
        return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())

    train = saved([3, 5, 7, 5] * 3)
    datasets.DatasetDict({"train": train, "val": saved([7, 5]), "odd": saved([5, 9])}).save_to_disk(tmp_path / "d")
    data = HuggingFaceImages(str(tmp_path / "d"), val_split="val", **SMALL)
    data.setup("fit")
    assert data.classes == ["3", "5", "7"]
    batch = next(iter(data.val_dataloader()))
    assert dict(zip(numbers(batch), batch.labels.tolist(), strict=True)) == {0: 2, 1: 1}
    with pytest.raises(ValueError, match=r"split 'odd' has the class '9', and the training images have 3, 5, 7"):
        HuggingFaceImages(str(tmp_path / "d"), val_split="odd", **SMALL).setup("fit")
    with pytest.raises(ValueError, match=r"has no split 'test': choose one of train, val, odd"):
        HuggingFaceImages(str(tmp_path / "d"), val_split="test", **SMALL).setup("fit")
    train.save_to_disk(tmp_path / "alone")
    with pytest.raises(ValueError, match="is one data set without splits, and cannot be 'train' and 'val'"):
        HuggingFaceImages(str(tmp_path / "alone"), val_split="val", **SMALL).setup("fit")
    stream = HuggingFaceImages(str(tmp_path / "d"), val_split="val", streaming=True, size=12, **SMALL)
    stream.setup("fit")
    assert sorted(flat(epoch(stream))) == list(range(12)), "a saved data set can be streamed"
    datasets.DatasetDict({"train": saved(["a", "b"]), "val": saved(["a"])}).save_to_disk(tmp_path / "text")
    with pytest.raises(ValueError, match=r"data.label_column='label' of .* is text"):
        HuggingFaceImages(str(tmp_path / "text"), val_split="val", streaming=True, size=4, **SMALL).setup("fit")


def test_rows_without_an_image_or_a_class_end_nothing(tmp_path: Path) -> None:
    images = [None if n == 2 else {"bytes": png(n), "path": None} for n in range(8)]
    rows = {"image": images, "label": [None if n == 3 else n % 2 for n in range(8)]}
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": made, "val": made}).save_to_disk(tmp_path / "d")
    data = HuggingFaceImages(str(tmp_path / "d"), val_split="val", streaming=True, size=8, **SMALL)
    data.setup("fit")
    with pytest.warns(UserWarning, match="cannot be decoded and is left out .*there is no image"):
        assert len(flat(epoch(data))) == 8
    with pytest.warns(UserWarning, match="there is no image"):
        held_out = list(data.val_dataloader())
    assert [n for batch in held_out for n in numbers(batch)] == [0, 1, 3, 4, 5, 6, 7]
    assert [label for batch in held_out for label in batch.labels.tolist()] == [0, 1, -1, 0, 1, 0, 1]


def partly_labeled(folder: Path, labels: list[Any], feature: str) -> HuggingFaceImages:
    """Twelve images on a disk, half of them held out."""
    of = datasets.ClassLabel(names=["ant", "bee"]) if feature == "class" else datasets.Value(feature)
    features = datasets.Features({"image": datasets.Image(), "label": of})
    rows = {"image": [{"bytes": png(n), "path": None} for n in range(12)], "label": labels}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder)
    return HuggingFaceImages(str(folder), val_fraction=0.5, **SMALL)


@pytest.mark.parametrize(
    ("labels", "feature", "classes", "expected"),
    [
        ([1, None, 0] * 4, "class", ["ant", "bee"], [1, -1, 0] * 4),
        ([1, -1, 0] * 4, "class", ["ant", "bee"], [1, -1, 0] * 4),
        ([5, None, 3] * 4, "int64", ["3", "5"], [1, -1, 0] * 4),
        ([5, -1, 3] * 4, "int64", ["3", "5"], [1, -1, 0] * 4),
        (["b", None, "a"] * 4, "string", ["a", "b"], [1, -1, 0] * 4),
        ([True, False, None] * 4, "bool", ["False", "True"], [1, 0, -1] * 4),
    ],
)
def test_rows_without_a_class_on_a_disk(
    tmp_path: Path, labels: list[Any], feature: str, classes: list[str], expected: list[int], caplog: Any
) -> None:
    data = partly_labeled(tmp_path / "d", labels, feature)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        data.setup("fit")
    assert data.classes == classes
    assert "Found 6 images in 2 classes to train on and 6 to hold out" in caplog.text
    assert "4 of them have no class" in caplog.text
    found = [*data.plain_train_dataloader(), *data.val_dataloader()]
    both = {number: label for batch in found for number, label in zip(numbers(batch), batch.labels.tolist(), strict=True)}
    assert [both[n] for n in range(12)] == expected


def test_images_without_a_class_among_others_train_and_are_not_classified(tmp_path: Path) -> None:
    data = partly_labeled(tmp_path / "d", [1, None, 0] * 4, "class")
    run = trainer(tmp_path / "run", max_steps=1, limit_val_batches=1.0, val_check_interval=1)
    run.fit(small_ijepa(), data)
    assert "val/knn_accuracy" in run.callback_metrics, "of those that have a class"
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"4 images of .* have no class, and KNNProbe needs that of each"):
        trainer(tmp_path / "knn").test(KNNProbe(str(tmp_path / "a.ckpt")), data, verbose=False)
    trainer(tmp_path / "c", limit_test_batches=1.0).test(ComparisonProbe(str(tmp_path / "a.ckpt")), data, verbose=False)
    report = json.loads((tmp_path / "c" / "report.json").read_text())
    assert "linear" not in str(report) and "consistency" in str(report)


def test_a_column_that_holds_no_classes_is_none(tmp_path: Path) -> None:
    images = [{"bytes": png(n), "path": None} for n in range(8)]
    for name, labels in (("lists", [[1, 2]] * 8), ("floats", [0.5] * 8), ("text", ["a", "b"] * 4)):
        made = datasets.Dataset.from_dict({"image": images, "label": labels}).cast_column("image", datasets.Image())
        datasets.DatasetDict({"train": made, "val": made}).save_to_disk(tmp_path / name)
        column: Any = "" if name == "text" else None
        for streaming in (False, True):
            settings = SMALL | {"val_split": "val", "streaming": streaming, "size": 8, "label_column": column}
            data = HuggingFaceImages(str(tmp_path / name), **settings)
            data.setup("fit")
            assert data.num_classes == 0
            assert [label for batch in data.val_dataloader() for label in batch.labels.tolist()] == [-1] * 8
        if name != "text":
            with pytest.raises(ValueError, match=r"data.label_column='label' of .* and classes are integers or text"):
                HuggingFaceImages(str(tmp_path / name), label_column="label", **SMALL).setup("fit")


def test_a_path_of_a_stream_is_read_by_the_worker(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(7))
    images = StreamedImages((16, 16), 0, 0, None, PixelFormat())
    batch: Any = images.__getitems__([(0, 0, Record(str(tmp_path / "a.png"), 1, "a"))])
    assert numbers(batch) == [7]


def test_an_empty_share_is_an_error() -> None:
    with pytest.raises(ValueError, match="ended after 0 images"):
        list(StreamBatches(lambda epoch: iter(()), 4, 2))


def test_a_held_out_stream_of_which_nothing_can_be_read_is_an_error(tmp_path: Path) -> None:
    images = [{"bytes": png(n) if n < 8 else b"damaged", "path": None} for n in range(14)]
    made = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
    parts = {"train": made.select(range(8)), "val": made.select(range(8, 14))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "d")
    data = HuggingFaceImages(str(tmp_path / "d"), val_split="val", streaming=True, size=8, **SMALL)
    data.setup("fit")
    with pytest.warns(UserWarning, match="cannot be decoded"):
        with pytest.raises(ValueError, match=r"Not one image of 2 held-out batches of this process can be decoded"):
            list(data.val_dataloader())


def test_a_share_of_fewer_images_than_the_others_begins_anew() -> None:
    def stream(epoch: int) -> Iterator[Record]:
        return (Record(b"", number, f"{epoch} {number}") for number in range(5))

    def labels(**settings: Any) -> list[int]:
        sampler = StreamBatches(stream, 3, 4, **settings)
        return [record.label for part in sampler for *_, record in part]

    with pytest.warns(UserWarning, match="ended after 5 of 12 images, and begins anew.*some images come twice"):
        assert labels(unequal=True) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    with pytest.raises(ValueError, match="ended after 5 images, and data.size promised 12"):
        labels()
    sampler = StreamBatches(stream, 3, 4, unequal=True)
    sampler.first_batch = 2
    with pytest.warns(UserWarning, match="begins anew"):
        assert [[place for _, place, _ in part] for part in sampler] == [[6, 7, 8], [9, 10, 11]], "taken up in the middle"
    with warnings.catch_warnings(action="error"):
        assert len(list(StreamBatches(stream, 5, 1, unequal=True))) == 1, "it has all that it needs"
        assert len(list(StreamBatches(stream, 3, None, unequal=True))) == 2, "held-out images: to their end"
    with pytest.raises(ValueError, match="ended after 0 images"):
        list(StreamBatches(lambda epoch: iter(()), 4, 2, unequal=True))


def test_processes_with_shards_of_unequal_sizes_take_equally_many_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "d", 16, 1)
    (tmp_path / "d" / "train-0.parquet").rename(tmp_path / "d" / "train-1.parquet")
    write(tmp_path / "other", 8, 1)
    (tmp_path / "other" / "train-0.parquet").rename(tmp_path / "d" / "train-0.parquet")
    counts = []
    for rank in range(2):
        data = streamed(tmp_path / "d", size=24)
        monkeypatch.setattr(type(data), "rank", (rank, 2))
        data.setup("fit")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            counts.append((len(epoch(data)), sum("begins anew" in str(warning.message) for warning in said)))
    assert sorted(counts) == [(3, 0), (3, 1)]


def test_a_stream_of_fewer_images_than_promised_is_an_error(shards: Path) -> None:
    data = streamed(shards, size=52)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"ended after 48 images, and data.size promised 52"):
        epoch(data)
    short = streamed(shards, size=20)
    short.setup("fit")
    assert len(epoch(short)) == 5 and len(set(flat(epoch(short)))) == 20


def test_a_batch_that_cannot_be_read_is_named_and_another_stands_in() -> None:
    def stream(epoch: int) -> Iterator[Record]:
        for number in range(8):
            yield Record(b"no image" if number in (1, 7) else png(number), number, f"image {number}")

    sampler = StreamBatches(stream, 4, 2)
    images = StreamedImages((16, 16), 0, 0, random_change((16, 16), (1.0, 1.0), 0.0), PixelFormat())
    with pytest.warns(UserWarning, match="image 1 cannot be decoded and is left out"):
        first, second = (images.__getitems__(next(iter(sampler))) for _ in range(2))
    assert first.labels.tolist() == [0, 2, 2, 3] == second.labels.tolist()
    with pytest.warns(UserWarning, match="image 7"):
        assert images.__getitems__([*sampler][1]).labels.tolist() == [4, 5, 6, 4]
    held_out = StreamedImages((16, 16), 0, 0, None, PixelFormat())
    with pytest.warns(UserWarning, match="image 1"):
        assert held_out.__getitems__(next(iter(sampler))).labels.tolist() == [0, 2, 3]
    bad = [(0, place, Record(b"", 0, f"bad {place}")) for place in range(2)]
    with pytest.warns(UserWarning, match="bad"):
        assert held_out.__getitems__(bad) is None
    with pytest.raises(ValueError, match="None of the 2 images of a batch can be decoded; the last is bad 1"):
        with pytest.warns(UserWarning, match="bad"):
            images.__getitems__(bad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_split": None}, "data.streaming=true needs data.val_split"),
        ({"image_size": None}, "data.image_size=null with data.streaming: a stream has no images"),
        ({"fraction": 0.5}, "takes no data.fraction"),
        ({"size": 0}, "data.size=0"),
        ({"shuffle_buffer": 0}, "data.shuffle_buffer=0: give at least 1"),
        ({"val_fraction": 1.0}, "data.val_fraction=1.0"),
        ({"size": 3}, "data.size=3 does not fill one batch of 4"),
        ({"size": None}, "does not say how many images it has: give data.size"),
    ],
)
def test_impossible_streams_are_refused(shards: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data = streamed(shards, **changes)
        data.setup("fit")
        data.make_train_loader()


def test_what_a_stream_cannot_do_is_said(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="predict embeds what is on a disk"):
        streamed(shards).setup("predict")
    data = streamed(shards)
    data.setup("fit")
    with pytest.raises(ValueError, match="this probe reads all training images at will"):
        data.plain_train_dataloader()


def test_without_the_package_it_is_said_what_to_install(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "jepa-lightning\[hf\]"'):
        library()


def test_an_iwm_learns_from_a_stream(shards: Path, tmp_path: Path) -> None:
    data = streamed(shards, views=Views())
    run = trainer(tmp_path, max_steps=2, limit_val_batches=1.0, num_sanity_val_steps=1, val_check_interval=2)
    run.fit(small_iwm(), data)
    assert run.callback_metrics["val/mrr"] > 0
    held_out, again = (next(iter(data.val_dataloader())) for _ in range(2))
    assert torch.equal(held_out.sources, again.sources) and held_out.images is not None
    assert sorted(numbers(held_out)) == [200, 201, 202, 203]
    batch = next(iter(data.train_dataloader()))
    assert batch.sources.shape == batch.targets.shape == (4, 3, 16, 16) and batch.actions.shape == (4, 7)


class Cut(Callback):
    """Write a checkpoint after some batches, and note which images were seen."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.batch, self.seen = path, batch, []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch.images.mean(dim=(1, 2, 3)).tolist())
        if len(self.seen) == self.batch:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
@pytest.mark.parametrize("batch", [5, 12, 17])
def test_a_cut_run_goes_on_with_the_next_image(shards: Path, tmp_path: Path, kind: str, batch: int) -> None:
    def fit(cut: Cut, path: Path | None = None) -> Any:
        model = small_ijepa(momentum=0.9)
        trainer(tmp_path, max_epochs=2, callbacks=[cut]).fit(model, streamed(shards, kind), ckpt_path=path)
        return model

    whole, rest = Cut(tmp_path / "cut.ckpt", batch), Cut(tmp_path / "none.ckpt", -1)
    models = fit(whole), fit(rest, tmp_path / "cut.ckpt")
    assert len(whole.seen) == 24 and rest.seen == whole.seen[batch:]
    assert all(parameters_equal(*pair) for pair in zip(*(model.children() for model in models), strict=True))


TWO = """
import json, os, signal, sys
from pathlib import Path
import datasets
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1
from conftest import small_ijepa, trainer
from callbacks import CollapseAlarm
from jepa_lightning.sharding import FSDP2Strategy
from lightning.pytorch import Callback
from test_hugging_face_images import numbers, streamed

out, shards, cut = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

class Watch(Callback):
    def __init__(self, kind):
        self.kind = kind

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        # Each value of an image is its number, which normalization has shifted: undo it for the first channel.
        seen = (batch.images[:, 0].mean(dim=(1, 2)) * 0.229 + 0.485) * 255
        with open(out / f"{self.kind} {trainer.global_rank} {trainer.current_epoch}", "a") as file:
            file.write(json.dumps(seen.round().int().tolist()) + chr(10))
        if trainer.global_step == cut:
            trainer.save_checkpoint(out.parent / f"{self.kind}.ckpt")
            if self.kind == "webdataset":
                os.kill(os.getpid(), signal.SIGKILL)
            trainer.should_stop = True

for kind in ("parquet", "webdataset"):
    path = out.parent / f"{kind}.ckpt"
    run = trainer(out, devices=2, strategy="ddp", max_epochs=2, callbacks=[Watch(kind)], limit_val_batches=1.0)
    data = streamed(shards, kind, num_workers=1)
    run.fit(small_ijepa(), data, ckpt_path=path if path.exists() else None, weights_only=True)
    assert cut > 0 or run.callback_metrics["val/loss"] > 0

said = ""
for batches in (1.0, 1):  # held-out batches of a stream are not counted before they are read
    strategy = FSDP2Strategy(save_distributed_checkpoint=False)
    settings = {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": batches, "callbacks": [CollapseAlarm()]}
    run = trainer(out, devices=2, strategy=strategy, **settings)
    try:
        run.fit(small_ijepa(), streamed(shards))
    except ValueError as error:
        said = str(error)
figures = [said, run.callback_metrics["val/rankme"].item(), run.global_step]
(out / f"sharded {run.global_rank}").write_text(json.dumps(figures))
"""


def test_two_processes_cut_and_resumed_see_each_image_once(shards: Path, tmp_path: Path) -> None:
    """48 images, four each for two processes: six steps an epoch, cut after the fourth; both at once, to start them once."""
    out = tmp_path / "first"
    out.mkdir()
    (out / "script.py").write_text(TWO)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(out / "script.py"), str(out), str(shards), "4"]
    with (out / "log").open("w") as log:  # a file: the end of a pipe would be that of workers that outlive the kill
        done = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=200, check=False)
    assert done.returncode != 0 and (tmp_path / "webdataset.ckpt").exists(), (out / "log").read_text()[-2000:]
    run_script(TWO, tmp_path / "second", str(shards), "-1")
    for kind, number in itertools.product(("parquet", "webdataset"), range(2)):
        seen: list[list[int]] = []
        for part, rank in itertools.product(("first", "second"), range(2)):
            file = tmp_path / part / f"{kind} {rank} {number}"
            seen += [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        assert len(seen) == 12 and sorted(flat(seen)) == list(range(48)), "none lost, none twice"
    # In the second run, which starts processes anyway, sharded networks learn from the stream as well.
    sharded = [json.loads((tmp_path / "second" / f"sharded {rank}").read_text()) for rank in range(2)]
    said, figures, steps = zip(*sharded, strict=True)
    assert all("a stream does not say how many it has: set trainer.limit_val_batches" in text for text in said)
    assert figures[0] == figures[1] > 1 and steps == (2, 2)


def test_shards_that_do_not_divide_are_shared_image_by_image(tmp_path: Path) -> None:
    folder = write(tmp_path / "three", 24, 3)
    data = streamed(folder, size=24)
    data.setup("fit")
    found = []
    for rank in range(2):
        stream = data.source.records("train", (rank, 2), (0, 5), 1)
        found.append([int(np.asarray(Image.open(io.BytesIO(record.content)))[0, 0, 0]) for record in stream])
    assert sorted(flat(found)) == list(range(24)) and len(found[0]) == len(found[1]) == 12
