"""Which checkpoints there are: the last three, whatever disks and clocks do."""

import errno
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from conftest import small_data, small_model, trainer
from faults import same
from lightning.pytorch import Callback
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from test_going_on import fit, last

from callbacks import LastCheckpoint
from callbacks.checkpointing import checkpoints_to_resume, keep_previous
from jepa_lightning.cli import newest_checkpoint
from jepa_lightning.weights.checkpoints import read_checkpoint
from jepa_lightning.weights.io import AtomicCheckpointIO


def test_the_last_three_checkpoints_are_there(tmp_path: Path) -> None:
    fit(tmp_path, 5)
    steps = {path.name: read_checkpoint(path)["global_step"] for path in (tmp_path / "checkpoints").iterdir()}
    assert steps == {"last.ckpt": 5, "last-1.ckpt": 4, "last-2.ckpt": 3}
    assert [Path(path).name for path in checkpoints_to_resume(tmp_path)] == ["last.ckpt", "last-1.ckpt", "last-2.ckpt"]


def test_a_damaged_last_checkpoint_is_named_and_the_one_before_it_taken(tmp_path: Path) -> None:
    fit(tmp_path, 3)
    content = last(tmp_path).read_bytes()
    last(tmp_path).write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=r"last.ckpt cannot be read .*The one before it is taken"):
        found = newest_checkpoint(str(tmp_path))
    assert found is not None and read_checkpoint(found)["global_step"] == 2


def test_the_newest_of_all_checkpoints_is_taken(tmp_path: Path) -> None:
    fit(tmp_path, 2)
    assert newest_checkpoint(str(tmp_path / "nowhere")) is None
    later = tmp_path / "hpc_ckpt_3.ckpt"
    later.write_bytes(last(tmp_path).read_bytes())
    (tmp_path / "hpc_ckpt_x.ckpt").write_text("not one of them")
    os.utime(later, ns=(later.stat().st_mtime_ns + 10**10,) * 2)
    assert newest_checkpoint(str(tmp_path)) == str(later)


class SecondProcess(SingleDeviceStrategy):
    """As if this were the second of two processes."""

    is_global_zero = False


@pytest.mark.parametrize("remote", [True, False])
def test_files_of_this_disk_are_kept_by_the_first_process_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    kept: list[Path] = []
    monkeypatch.setattr("callbacks.checkpointing.keep_previous", kept.append)
    fit(tmp_path, 2)
    assert kept == [last(tmp_path)] * 2
    root = {"default_root_dir": f"memory://{tmp_path.name}-kept"} if remote else {"strategy": SecondProcess()}
    fit(tmp_path / "other", 2, **root, plugins=[AtomicCheckpointIO()])
    assert len(kept) == 2


def test_a_failed_write_does_not_push_out_good_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for content in ("1", "2", "3"):
        keep_previous(folder / "last.ckpt")
        (folder / "new").write_text(content)
        (folder / "new").replace(folder / "last.ckpt")
    for _ in range(3):
        keep_previous(folder / "last.ckpt")  # and nothing is written after it
    found = {path.name: path.read_text() for path in folder.iterdir()}
    assert found["last.ckpt"] == "3" and set(found.values()) >= {"2", "3"}


class FullDisk(AtomicCheckpointIO):
    """A disk that is full between two steps."""

    def __init__(self, first: int, end: int, code: int = errno.ENOSPC) -> None:
        self.full, self.code = range(first, end), code

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if checkpoint["global_step"] in self.full:
            raise OSError(self.code, os.strerror(self.code))
        super().save_checkpoint(checkpoint, path, storage_options)


def test_a_disk_that_is_full_for_a_while_costs_the_checkpoints_of_that_while(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"last.ckpt could not be written \(No space left on device\). Training goes on"):
        run, _ = fit(tmp_path, 6, plugins=[FullDisk(3, 5)])
    assert run.global_step == 6
    names = ("last.ckpt", "last-1.ckpt", "last-2.ckpt")
    assert [read_checkpoint(tmp_path / "checkpoints" / name)["global_step"] for name in names] == [6, 5, 2]


def test_a_writer_in_the_background_is_waited_for_at_the_end(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"could not be written"):
        run, _ = fit(tmp_path, 6, plugins=[AsyncCheckpointIO(FullDisk(2, 4))])
    assert run.global_step == 6 and read_checkpoint(last(tmp_path))["global_step"] == 6
    with pytest.raises(OSError, match="No space left"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path / "end", 4, plugins=[AsyncCheckpointIO(FullDisk(4, 9))])
    assert read_checkpoint(last(tmp_path / "end"))["global_step"] == 3


def test_a_run_whose_end_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"), pytest.warns(UserWarning, match="could not be written"):
        fit(tmp_path, 4, plugins=[FullDisk(4, 9)])
    assert read_checkpoint(last(tmp_path))["global_step"] == 3


def test_an_error_that_no_patience_mends_ends_training(tmp_path: Path) -> None:
    with pytest.raises(PermissionError):
        fit(tmp_path, 4, plugins=[FullDisk(2, 9, errno.EACCES)])


def test_checkpoints_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("callbacks.checkpointing.time.monotonic", lambda: clock[0])

    class Tick(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            clock[0] += 20

    class Slow(AtomicCheckpointIO):
        steps: list[int] = []  # noqa: RUF012

        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            super().save_checkpoint(checkpoint, path, storage_options)
            self.steps.append(checkpoint["global_step"])
            clock[0] += 0 if len(self.steps) < 2 else 8  # of a file that takes 8 seconds, each 160 seconds

    callbacks = [Tick(), LastCheckpoint(every_minutes=0.9)]
    run = trainer(tmp_path, callbacks=callbacks, plugins=[Slow()], max_steps=20, enable_checkpointing=True)
    run.fit(small_model(), small_data())
    assert Slow.steps == [3, 6, 14, 20]


def test_asynchronous_writing_and_urls(tmp_path: Path) -> None:
    fit(tmp_path, 3, plugins=[AsyncCheckpointIO(AtomicCheckpointIO())])
    assert read_checkpoint(last(tmp_path))["global_step"] == 3
    root = f"memory://{tmp_path.name}"
    run, _ = fit(Path("unused"), 3, plugins=[AtomicCheckpointIO()], default_root_dir=root)
    (found,) = checkpoints_to_resume(root)
    assert found.startswith("memory://") and found.endswith(f"{tmp_path.name}/checkpoints/last.ckpt")
    again = read_checkpoint(f"{root}/checkpoints/last.ckpt")
    assert same(again["state_dict"], dict(run.lightning_module.state_dict()))
    with pytest.raises(FileNotFoundError, match="No checkpoint at memory://"):
        read_checkpoint(f"{root}/checkpoints/first.ckpt")
