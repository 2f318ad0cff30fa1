"""The checkpoints of a run: the best one, the last ones, and which of them to go on from."""

import errno
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any, Literal

import torch
from fsspec.core import url_to_fs
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from callbacks.agreement import Agreement

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What a disk says that is full, or may be well again later."""


def checkpoint_folder(root: str | os.PathLike[str]) -> str:
    """Where a run keeps its checkpoints, whichever logger it has: a path or a URL."""
    return os.path.join(root, "checkpoints")


def is_local(path: str | os.PathLike[str]) -> bool:
    """Whether a path is one of this file system, not a URL."""
    return _is_local_file_protocol(str(path))


def checkpoints_to_resume(root: str | os.PathLike[str]) -> list[str]:
    """What a run can go on from, newest first: last.ckpt, the two before it, and what a batch system's signal had saved.

    Args:
        root: The run directory, a path or a URL.

    Returns:
        Paths or URLs of files, or of the folders of a sharded model.
    """
    files, folder = url_to_fs(str(root))
    listed = [
        (files.modified(name), name if is_local(root) else files.unstrip_protocol(name))
        for place, pattern in ((f"{folder}/checkpoints", r"last(-[12])?\.ckpt"), (folder, r"hpc_ckpt_\d+\.ckpt"))
        if files.isdir(place)
        for name in files.ls(place, detail=False)
        if re.fullmatch(pattern, name.rsplit("/", 1)[-1])
    ]
    return [name for _, name in sorted(listed, reverse=True)]


class RunCheckpoint(ModelCheckpoint):
    """A checkpoint in the run directory, whose failure to be written does not end training.

    A disk that is full for a while costs the checkpoints of that while, not the run: a warning says so, what was written
    before is still there, and the next one is tried in its turn.
    """

    dirpath: str | os.PathLike[str] | None
    monitor: str | None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.dirpath is None:
            self.dirpath = checkpoint_folder(trainer.default_root_dir)
        super().setup(trainer, pl_module, stage)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        try:
            super()._save_checkpoint(trainer, filepath)
        except OSError as error:
            if error.errno not in FULL:
                raise
            finish_writing(trainer)  # which would raise the same error again and again
            # Only the process that writes comes here; the others wait for it at the end of Trainer.save_checkpoint.
            trainer.strategy.barrier("Trainer.save_checkpoint")
            self.on_failure(filepath, error)

    def on_failure(self, filepath: str, error: OSError) -> None:
        """Say what was not written."""
        rank_zero_warn(f"{filepath} could not be written ({error.strerror}). Training goes on; what was there is kept.")


class BestCheckpoint(RunCheckpoint):
    """Keep `best.ckpt`, the checkpoint at which a figure of the validation was best.

    The figure must be one that a collapse cannot improve. The loss of a JEPA is none: its targets move, it rises in a
    healthy run, and it is smallest where all embeddings are the same.

    Args:
        monitor: Name of the validation figure. If left out, the module's `best_metric`; without that there is no best.ckpt.
        mode: Whether the minimum or the maximum of the figure is best; as the module says if left out.
    """

    def __init__(self, monitor: str | None = None, mode: Literal["min", "max"] | None = None) -> None:
        super().__init__(
            filename="best",
            monitor=monitor,
            mode=mode or "min",
            enable_version_counter=False,
            save_on_train_epoch_end=False,  # where Lightning moves it if there is a validation in each epoch
        )
        self._mode_given = mode is not None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.monitor is None:
            self.monitor, mode = getattr(pl_module, "best_metric", (None, "min"))
            if not self._mode_given:
                self.mode, self.kth_value = mode, torch.tensor(float("inf" if mode == "min" else "-inf"))
        super().setup(trainer, pl_module, stage)
        if stage == TrainerFn.FITTING:
            what = "there will be none" if self.monitor is None else f"that of the {self.mode}imum {self.monitor}"
            rank_zero_info(f"best.ckpt: {what}; last.ckpt is the one to evaluate.")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not logged by data without labels, for instance: then there is no best.
        if self.monitor in trainer.callback_metrics:
            super().on_validation_end(trainer, pl_module)


class LastCheckpoint(RunCheckpoint):
    """Keep `last.ckpt` and, for the case that it is damaged, the two before it: `last-1.ckpt` and `last-2.ckpt`.

    It is written now and then, at the end of training, and when `Preemption` asks for it. Resume with --ckpt_path last.

    Args:
        every_n_train_steps: Number of optimizer steps between two writes, instead of a time.
        every_minutes: Minutes between two writes, which is what a kill can cost; more where writing takes long, so that
            it takes no more than a twentieth of the time.

    Raises:
        ValueError: An interval that is not positive.
    """

    MAX_SHARE = 0.05
    """Maximum fraction of the time that goes into writing."""

    def __init__(self, every_n_train_steps: int | None = None, every_minutes: float = 1.0) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps={every_n_train_steps}: give a number of optimizer steps of at least 1.")
        if not every_minutes > 0:
            raise ValueError(f"every_minutes={every_minutes}: give a positive number of minutes.")
        super().__init__()
        self.every_minutes, self.every_steps = every_minutes, every_n_train_steps
        self._due = 0.0
        self._seen_step = self._written_step = -1
        self._failed: OSError | None = None

    def state_dict(self) -> dict[str, Any]:
        """Nothing: which files there are is seen in the folder."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing, see `state_dict`."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._agree = Agreement(trainer)  # clocks of several processes differ
        self._due, self._seen_step = time.monotonic() + 60 * self.every_minutes, trainer.global_step
        self._written_step = -1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.every_steps is None:
            due = bool(self._agree(time.monotonic() >= self._due))
        else:
            due = trainer.global_step % self.every_steps == 0
        if due and trainer.global_step != self._seen_step:  # else a batch without an optimizer step
            self._seen_step = trainer.global_step
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: an epoch's end is a step like any other."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing, see `on_train_epoch_end`."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the end of training.

        Raises:
            OSError: It could not be written.
        """
        if not trainer.fast_dev_run:
            self.save(trainer, must=True)
        for path in Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt") if trainer.is_global_zero else ():
            remove(path)  # a job that is started again in this directory would go on from it

    def save(self, trainer: Trainer, must: bool = False) -> str:
        """Write last.ckpt now, unless this step has been written.

        Args:
            trainer: Trainer of the run; all processes call this in the same step.
            must: Whether to raise what went wrong.

        Returns:
            Its path.

        Raises:
            OSError: The checkpoint could not be written, and must be.
        """
        path = os.path.join(str(self.dirpath), "last.ckpt")
        if trainer.global_step == self._written_step:
            return path
        if must:
            finish_writing(trainer)  # what went wrong before is of no account
        self._failed, began = None, time.monotonic()
        if trainer.is_global_zero and is_local(path):
            keep_previous(Path(path))
        trainer.strategy.barrier("previous checkpoints")
        self._save_checkpoint(trainer, path)
        if must:
            self._failed = finish_writing(trainer) or self._failed
        now = time.monotonic()
        self._due = now + max(60 * self.every_minutes, (now - began) / self.MAX_SHARE)
        if trainer.strategy.reduce_boolean_decision(self._failed is None):  # known to the process that writes alone
            self._written_step = trainer.global_step
        elif must:
            raise self._failed or OSError(errno.EIO, f"{path} could not be written by another process")
        return path

    def on_failure(self, filepath: str, error: OSError) -> None:
        super().on_failure(filepath, error)
        self._failed = error


def finish_writing(trainer: Trainer) -> OSError | None:
    """Wait for a writer that works in the background, if there is one, and forget what went wrong, which is returned."""
    writer = trainer.strategy.checkpoint_io
    if not isinstance(writer, AsyncCheckpointIO):
        return None
    try:
        writer.teardown()  # it starts again with the next checkpoint
    except OSError as error:
        writer._error = None
        return error
    return None


def keep_previous(path: Path) -> None:
    """Before last.ckpt is written anew, let what it holds be last-1.ckpt, and what that held last-2.ckpt.

    last.ckpt itself stays in its place until the new one takes it, where the file system can give a file two names.
    """
    if not path.exists():
        return
    first, second = path.with_name("last-1.ckpt"), path.with_name("last-2.ckpt")
    if first.exists() and os.path.samestat(first.stat(), path.stat()):
        return  # the last write failed
    if first.exists():
        remove(second)
        first.rename(second)
    try:
        os.link(path, first)
    except OSError:  # a folder, or a file system without links
        path.rename(first)


def remove(path: Path) -> None:
    """Remove a checkpoint, a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def next_hpc_checkpoint(root: str | os.PathLike[str]) -> str:
    """Path of the next checkpoint that a batch system's signal saves: Lightning's Trainer goes on from the highest one."""
    names = [path.name for path in Path(root).glob("hpc_ckpt_*.ckpt")]
    numbers = [int(number) for name in names for number in re.findall(r"(\d+)\.ckpt$", name)]
    return os.path.join(root, f"hpc_ckpt_{max(numbers, default=0) + 1}.ckpt")
