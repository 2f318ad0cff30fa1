"""Bad files of a data set: named once in a run, whoever comes upon them, and never the end of it."""

import json
import os
import pickle
import re
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import run_script, small_ijepa, small_images, small_iwm, small_views, trainer, write_images

from datamodules import ImageFolder
from datamodules.image_datasets import UnreadableImageWarning
from datamodules.unreadable import UnreadableFiles


def test_flags_are_shared_and_counted(tmp_path: Path) -> None:
    flags = UnreadableFiles(5)
    spawned = pickle.loads(pickle.dumps(flags))
    assert len(flags) == 0 and 3 not in flags
    assert flags.add(3) == 1 and 3 in spawned and spawned.add(3) is None
    assert spawned.add(0) == 2 and len(flags) == 2 and 0 in flags and 1 not in flags
    other = UnreadableFiles(5)
    assert len(other) == 0, "of another data set"
    assert len(UnreadableFiles(0)) == 0, "a list may name all images, and leave none for validation"


def test_flags_go_with_their_owner_and_not_with_a_worker() -> None:
    flags = UnreadableFiles(5, token="of-a-test")
    path = flags.path
    assert len(UnreadableFiles(5, token="of-a-test-too")) == 0
    worker = os.fork()
    if worker == 0:
        del flags  # a forked worker ends
        os._exit(0)
    os.waitpid(worker, 0)
    assert path.exists()
    same = pickle.loads(pickle.dumps(flags))
    flags.add(2)
    del flags
    assert not path.exists() and 2 in same


def recorded() -> warnings.catch_warnings:
    """Warnings as a list, not as errors."""
    return warnings.catch_warnings(record=True, action="always")


def about_files(said: list[warnings.WarningMessage]) -> list[str]:
    """Those about bad files."""
    return [str(warning.message) for warning in said if warning.category is UnreadableImageWarning]


def damage(folder: Path, count: int) -> None:
    """The first images of a folder of them become unreadable."""
    for number in range(count):
        (folder / f"{number:04d}.jpg").write_bytes(b"no image")


@pytest.fixture
def bad_folder(tmp_path: Path) -> Path:
    """6 of 24 training images and 2 of 8 held-out ones are bad."""
    for split, count, bad in (("train", 24, 6), ("val", 8, 2)):
        write_images(tmp_path / "data" / split / "a", count)
        damage(tmp_path / "data" / split / "a", bad)
    return tmp_path / "data"


def bad_files(lines: list[str]) -> dict[str, int]:
    """File -> the count that its warning says."""
    named = [re.search(r"(\w+)/a/(\d+).jpg cannot be decoded .* (\d+) of (\d+) so far", line).groups() for line in lines]
    assert max(Counter((split, file) for split, file, *_ in named).values()) == 1, "named twice"
    return {f"{split}/{file}": int(count) for split, file, count, _ in named}


EXPECTED = {f"train/000{number}" for number in range(6)} | {"val/0000", "val/0001"}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_each_is_named_once_over_workers_epochs_and_validations(
    tmp_path: Path, bad_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = tmp_path / "said"

    def show(message: Warning, *_: object) -> None:
        with said.open("a") as file:
            file.write(f"{message}\n")

    data = small_images(bad_folder, num_workers=2, batch_size=2)
    data.setup("fit")
    with warnings.catch_warnings(action="always"):
        monkeypatch.setattr(warnings, "showwarning", show)
        for epoch in range(3):
            loader = data.train_dataloader()
            loader.sampler.set_epoch(epoch)
            assert sum(len(batch.images) for batch in loader) == 24
            assert sum(len(batch.images) for batch in data.val_dataloader()) == 6
        assert sum(len(batch.images) for batch in data.plain_train_dataloader()) == 18
    named = bad_files(said.read_text().splitlines())
    assert named.keys() == EXPECTED
    assert sorted(count for file, count in named.items() if file[0] == "t") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("model", "make"), [(small_ijepa, small_images), (small_iwm, small_views)])
def test_a_held_out_image_alone_in_its_batch_may_be_bad(tmp_path: Path, model, make) -> None:
    write_images(tmp_path / "train", 4)
    write_images(tmp_path / "val", 5)
    data = make(tmp_path, batch_size=2)
    data.setup("fit")
    last = Path(os.fsdecode(data._samples["val"].paths[-1]))
    last.write_bytes(b"no image")
    run = trainer(tmp_path, max_epochs=2, limit_val_batches=1.0)
    with recorded() as said:
        run.fit(model(), data)
        (figures,) = run.validate(model(), data, verbose=False)
        assert sum(len(batch) for batch in run.predict(model(), data)) == 8, "all that can be read, of both folders"
    messages = about_files(said)
    assert len(messages) == 2 and all(f"{last.name} cannot be decoded" in message for message in messages)
    assert "1 of 5 so far" in messages[0] and "1 of 9 so far" in messages[1], "predict reads another set of files"
    assert np.isfinite(figures["val/loss"])


def test_a_batch_of_bad_ones_in_the_middle_is_left_out(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 4)
    write_images(tmp_path / "val", 6)
    data = small_images(tmp_path, batch_size=2)
    data.setup("fit")
    for path in data._samples["val"].paths[2:5]:
        Path(os.fsdecode(path)).write_bytes(b"no image")
    with recorded() as said:
        assert [len(batch.labels) for batch in data.val_dataloader()] == [2, 1]
    assert "3 of 6 so far" in about_files(said)[-1] and len(about_files(said)) == 3
    assert len(data.val_dataloader()) == 3


def test_nothing_to_evaluate_is_an_error(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_images(tmp_path / split, 4)
        damage(tmp_path / split, 4)
    data = small_images(tmp_path)
    data.setup("fit")
    with (
        recorded() as said,
        pytest.raises(ValueError, match=r"Not one of the 4 held-out images of this process can be decoded: repair"),
    ):
        list(data.val_dataloader())
    assert len(about_files(said)) == 4
    with recorded(), pytest.raises(ValueError, match="None of the 4 training images"):
        list(data.train_dataloader())


RANKS = """
import json, sys, warnings
from pathlib import Path
import datamodules.image_folder as image_folder
from conftest import small_ijepa, small_images, trainer

out, said, scans = Path(sys.argv[1]), [], []
scan = image_folder.scan
image_folder.scan = lambda *arguments: scans.append(str(arguments[0])) or scan(*arguments)
warnings.showwarning = lambda message, *_: said.append(str(message))
run = trainer(out, devices=2, strategy="ddp", max_epochs=3, limit_val_batches=1.0)
data = small_images(Path(sys.argv[2]), batch_size=2)
run.fit(small_ijepa(), data)
named = [message for message in said if "decoded" in message]
paths = [path.decode() for path in data._samples["train"].paths]
(out / f"rank{run.global_rank}.json").write_text(json.dumps({"said": named, "scans": scans, "paths": paths}))

nowhere = small_images(out / "nowhere")
nowhere.trainer = run
try:
    nowhere.setup("fit")
except FileNotFoundError as error:
    (out / f"error{run.global_rank}").write_text(str(error))
"""


def test_ranks_find_and_name_together(tmp_path: Path, bad_folder: Path) -> None:
    """Rank 0 looks for images and broadcasts them, errors too; neither names what the other has named."""
    run_script(RANKS, tmp_path / "out", str(bad_folder))
    first, second = (json.loads((tmp_path / "out" / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert len(first["scans"]) == 2 and second["scans"] == [], "training and validation, once"
    assert first["paths"] == second["paths"] and len(first["paths"]) == 24
    assert first["said"] and second["said"]
    assert bad_files(first["said"] + second["said"]).keys() == EXPECTED
    assert (tmp_path / "out" / "error0").read_text() == (tmp_path / "out" / "error1").read_text() != ""


def test_a_run_over_a_folder_with_bad_files_ends(tmp_path: Path, bad_folder: Path) -> None:
    run = trainer(tmp_path, max_epochs=2, limit_val_batches=1.0)
    with recorded() as said:
        run.fit(small_ijepa(), ImageFolder(str(bad_folder), image_size=16, batch_size=4, num_workers=0))
    assert run.global_step == 12
    assert bad_files(about_files(said)).keys() == EXPECTED
