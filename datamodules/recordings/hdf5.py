"""An HDF5 file as stable-worldmodel 0.1 and LeWM write it: a dataset for each column, one row after another.

Episode i has the `ep_len[i]` rows from row `ep_offset[i]` on. `pixels` (rows, H, W, C) uint8 are the frames and `action` the
actions: (rows, A) floats, or (rows,) integers. Of what else there is,

* `proprio` are the vectors;
* all columns of floats, the vectors among them, are the states, next to each other;
* `reward` are the rewards.

Two habits of stable-worldmodel's `World.collect` are made up for:

* It writes what each step has led to, and moves the actions up by one row. So the action of a row leads to the next row, and
  the last one, which was the first of the episode, leads nowhere: it is left out. Rewards are not moved: that of an action
  stands in the row it leads to.
* What an environment gives as a tensor, it writes into all rows of an episode alike, as it is at the end. Columns that never
  change within an episode are therefore left out, and with them goals and colors.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.recordings.columns import as_actions, as_vectors, library, reading, same_length, scalar_names
from datamodules.recordings.episode import Episode, RecordingInfo

NO_STATE = ("action", "reward", "terminated", "truncated", "step_idx", "render_time")
"""Columns that say nothing of the world."""

LOOKED_AT = 32
"""Number of episodes in which a column is looked at for changes."""


class HDF5File:
    """Episodes in an HDF5 file, named by their numbers.

    The file is opened anew for each episode: an open one can be neither pickled nor shared with a forked process.

    Args:
        path: The file.

    Raises:
        ValueError: It is no HDF5 file, or has not the columns that are needed; or h5py is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        library("h5py")
        with reading(str(path)), _opened(path) as file:
            missing = {"action", "ep_len", "ep_offset"} - set(file)
            if missing:
                raise ValueError(f"it has no {' and no '.join(sorted(missing))}, but {', '.join(file) or 'nothing'}")
            self.lengths, self.offsets = file["ep_len"][:].tolist(), file["ep_offset"][:].tolist()
            same_length(ep_len=self.lengths, ep_offset=self.offsets)
            self.frames = _frames(file)
            self.states = self._states(file)
            names = [name for column in self.states for name in scalar_names(column, file[column].shape[1:])]
        if not self.lengths:
            raise ValueError(f"{path} holds no episode.")
        self.names = [f"episode_{number}" for number in range(len(self.lengths))]
        self.info = RecordingInfo(state_names=names)

    def episode(self, number: int) -> Episode:
        """Read an episode; raises a ValueError that names it if it cannot be read."""
        name = self.names[number]
        start, end = self.offsets[number], self.offsets[number] + self.lengths[number]
        with reading(f"{name} of {self.path.name}"), _opened(self.path) as file:
            if not 0 <= start < end <= len(file["action"]):
                raise ValueError(f"it should have the rows {start} to {end} of {len(file['action'])}")
            columns = {column: file[column][start:end] for column in {*self.states, *filter(None, [self.frames])}}
            reward = file["reward"][start:end] if "reward" in file else None
            actions = file["action"][start:end]
            same_length(action=actions, reward=reward, **columns)
            return Episode(
                name,
                as_actions(actions[:-1]),
                frames=columns[self.frames] if self.frames else None,
                vectors=as_vectors([columns["proprio"]]) if "proprio" in columns else None,
                states=as_vectors([columns[column] for column in self.states]),
                rewards=None if reward is None else reward[1:].astype(np.float32).reshape(len(reward) - 1),
            )

    def _states(self, file: Any) -> list[str]:
        """Names of the columns that are states, in the order of their letters."""
        rows = len(file["action"])
        spans = [(start, start + length) for start, length in zip(self.offsets, self.lengths, strict=True) if length > 1]
        spans = [(start, end) for start, end in spans if 0 <= start < end <= rows]  # damaged ones are refused when read
        some = [spans[place] for place in np.linspace(0, len(spans) - 1, min(LOOKED_AT, len(spans)), dtype=int)]
        found = []
        for name in sorted(set(file) - set(NO_STATE)):
            column = file[name]
            if name.startswith("ep_") or not hasattr(column, "dtype") or column.dtype.kind != "f":
                continue
            if column.ndim not in (1, 2) or len(column) != rows:
                continue
            if not some or any(_changes(column, start, end) for start, end in some):
                found.append(name)
        return found


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open HDF5 file, with the filters of hdf5plugin if that is installed.

    Raises:
        ValueError: Something in it is compressed in a way that HDF5 does not know by itself.
    """
    with suppress(ImportError):
        importlib.import_module("hdf5plugin")
    with library("h5py").File(path, "r") as file:
        try:
            yield file
        except OSError as error:
            if "filter" in str(error) or "plugin" in str(error):
                raise ValueError("it is compressed with a filter that is missing here: pip install hdf5plugin") from error
            raise


def _frames(file: Any) -> str | None:
    """Name of the column of frames: "pixels", or else the first of several cameras."""
    images = [name for name in sorted(file) if getattr(file[name], "ndim", 0) == 4 and file[name].dtype == np.uint8]
    images = [name for name in images if "goal" not in name]
    return "pixels" if "pixels" in images else next(iter(images), None)


def _changes(column: Any, start: int, end: int) -> bool:
    """Whether the rows of an episode differ: its first, its middle and its last one."""
    first, middle, last = (column[row] for row in (start, (start + end) // 2, end - 1))
    return not (np.array_equal(first, middle, equal_nan=True) and np.array_equal(first, last, equal_nan=True))
