"""The episodes of a recording as a few large arrays, from which clips are cut.

Shapes: E episodes, F frames of all episodes, H W pixels, C channels, K numbers next to a frame.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from datamodules.environments import resized
from datamodules.new_folder import new_folder
from datamodules.recordings import Episode, Recording, RecordingInfo

COLUMNS = ("actions", "vectors", "states", "rewards")
"""What the table holds of each frame, in this order; actions and rewards are those of the step after it."""

NAMED = 3
"""Episodes that a warning names."""

SHOWN_ABOVE = 200
"""Number of episodes above which a bar shows how many have been read."""

FRAMES_FILE, REST_FILE = "frames.bin", "rest.pt"
"""What a folder of mapped episodes holds."""


@dataclass(frozen=True)
class Store:
    """Episodes one after the other.

    Args:
        frames: (F, C, H, W) uint8, in memory or mapped from a file; None without images.
        table: (F, K) float32: actions in [-1, 1] or one-hot, vectors, states and rewards, see `widths`.
        widths: Number of columns of each of `COLUMNS`.
        ends: Frame after the last one of each episode, (E,).
        names: Names of the episodes.
        seeds: Seeds that the environment was reset with, or None.
        info: Limits, choices and names.
    """

    frames: Tensor | None
    table: Tensor
    widths: dict[str, int]
    ends: NDArray[np.int64]
    names: list[str]
    seeds: list[int | None]
    info: RecordingInfo

    @property
    def starts(self) -> NDArray[np.int64]:
        """First frame of each episode, (E,)."""
        return np.concatenate([[0], self.ends[:-1]])

    def column(self, name: str) -> slice:
        """Where the table has one of `COLUMNS`."""
        begin = sum(self.widths[before] for before in COLUMNS[: COLUMNS.index(name)])
        return slice(begin, begin + self.widths[name])

    def episode(self, number: int) -> slice:
        """The frames of an episode."""
        return slice(int(self.starts[number]), int(self.ends[number]))


def load(recording: Recording, image_size: Any, channels: int, pixels: bool, mapped: Path | None) -> Store:
    """Read all episodes that can be used; one sentence says what was left out, and why.

    Args:
        recording: Where they are read from.
        image_size: Size of the frames in pixels; None for that of the first episode.
        channels: 1 for gray, 3 for RGB.
        pixels: Whether frames are wanted.
        mapped: Folder that the episodes are kept in, frames mapped into memory; made if it is not there. None keeps them in
            memory.

    Raises:
        ValueError: No episode can be used.
    """
    if mapped is None:
        parts: list[NDArray[np.uint8]] = []
        store = _read(recording, image_size, channels, pixels, parts.append)
        return replace(store, frames=_joined(parts)) if pixels else store
    if not mapped.is_dir():
        rank_zero_info(f"The frames are too many for the memory that data.max_gigabytes allows: they go into {mapped}.")
        with new_folder(mapped) as folder, (folder / FRAMES_FILE).open("wb") as file:
            shapes: list[tuple[int, ...]] = []

            def write(frames: NDArray[np.uint8]) -> None:
                shapes.append(frames.shape[1:])
                frames.tofile(file)

            store = _read(recording, image_size, channels, pixels, write)
            kept = {name: getattr(store, name) for name in ("table", "widths", "names", "seeds")}
            kept |= {"ends": store.ends.tolist(), "info": asdict(store.info), "shape": shapes[0]}
            torch.save(kept, folder / REST_FILE)
    found = torch.load(mapped / REST_FILE, weights_only=True)
    shape = (len(found["table"]), *found.pop("shape"))
    frames = np.memmap(mapped / FRAMES_FILE, np.uint8, "c", shape=shape)  # copied where written, which nobody does
    info, ends = RecordingInfo(**found.pop("info")), np.asarray(found.pop("ends"))
    return Store(torch.from_numpy(frames), info=info, ends=ends, **found)


def _joined(parts: list[NDArray[np.uint8]]) -> Tensor:
    """Arrays one after the other, each freed as soon as it is copied."""
    whole = np.empty((sum(len(part) for part in parts), *parts[0].shape[1:]), np.uint8)
    end = len(whole)
    while parts:
        part = parts.pop()
        whole[end - len(part) : end] = part
        end -= len(part)
    return torch.from_numpy(whole)


def estimated_gigabytes(recording: Recording, image_size: Any, channels: int) -> float:
    """What all frames would take, if all episodes were like the first one that can be read; 0 if none can."""
    for number in range(len(recording.names)):
        try:
            frames = recording.episode(number).frames
        except ValueError:
            continue
        if frames is None:
            return 0.0
        height, width = frames.shape[1:3] if image_size is None else np.broadcast_to(image_size, 2)
        return float(len(frames) * height * width * channels * len(recording.names) / 1e9)
    return 0.0


def _read(
    recording: Recording, image_size: Any, channels: int, pixels: bool, take: Callable[[NDArray[np.uint8]], object]
) -> Store:
    """All episodes that can be used, without their frames, which `take` is given episode by episode."""
    kept: list[dict[str, Any]] = []
    names: list[str] = []
    refused: list[str] = []
    first: Episode | None = None
    numbers = range(len(recording.names))
    for number in track(numbers, "read episodes") if len(numbers) > SHOWN_ABOVE else numbers:
        try:
            episode = checked(recording.episode(number), first, pixels)
        except ValueError as error:
            refused.append(str(error))
            continue
        first = first or episode._replace(frames=None if episode.frames is None else episode.frames[:1])
        if pixels:
            assert episode.frames is not None
            take(prepared(episode.frames, image_size, channels))
        kept.append({name: getattr(episode, name) for name in COLUMNS} | {"seed": episode.seed})
        names.append(episode.name)
    if refused:
        more = f", and {len(refused) - NAMED} more" if len(refused) > NAMED else ""
        rank_zero_warn(f"{len(refused)} of {len(numbers)} episodes are left out: {'; '.join(refused[:NAMED])}{more}.")
    if not kept:
        raise ValueError(f"None of {len(numbers)} episodes can be used.")
    info = completed(recording.info, [part["actions"] for part in kept])
    tables = [table_of(part, info) for part in kept]
    widths = {name: _width(kept[0][name], info if name == "actions" else None) for name in COLUMNS}
    ends = np.cumsum([len(table) for table in tables])
    seeds = [part["seed"] for part in kept]
    return Store(None, torch.from_numpy(np.concatenate(tables)), widths, ends, names, seeds, info)


def checked(episode: Episode, first: Episode | None, pixels: bool) -> Episode:
    """An episode that can be used, a last action that leads nowhere left out.

    Raises:
        ValueError: It is damaged, or not like the first one.
    """
    name, actions = episode.name, np.asarray(episode.actions)
    seen = episode.frames if pixels else episode.vectors
    if seen is None:
        raise ValueError(f"{name} has no {'frames' if pixels else 'vectors'}")
    steps = len(seen) - 1
    episode = episode._replace(actions=actions[:steps])
    if steps < 1:
        raise ValueError(f"{name} has {len(seen)} frame(s), and an action leads from one to the next")
    if len(actions) not in (steps, steps + 1):
        raise ValueError(f"{name} has {len(actions)} actions with {len(seen)} frames: one for each step between two frames")
    if pixels and (seen.dtype != np.uint8 or seen.ndim != 4 or seen.shape[-1] not in (1, 3)):
        raise ValueError(f"{name} has frames of {seen.dtype} and shape {seen.shape}: uint8 (T + 1, H, W, 1 or 3) is read")
    if not (np.issubdtype(actions.dtype, np.integer) and actions.ndim == 1) and actions.ndim != 2:
        raise ValueError(f"{name} has actions of shape {actions.shape}: (T, A), or (T,) integers of discrete ones")
    for field, values in (("actions", episode.actions), *((field, getattr(episode, field)) for field in COLUMNS[1:])):
        if values is None:
            continue
        if not np.isfinite(values).all():
            raise ValueError(f"{name} has {field} that are not finite")
        if field == "rewards" and values.size != len(values):
            raise ValueError(f"{name} has rewards of shape {values.shape}: one number for each step")
        wanted = steps if field in ("actions", "rewards") else steps + 1
        if len(values) < wanted:
            raise ValueError(f"{name} has {len(values)} {field} with {len(seen)} frames")
    if actions.ndim == 1 and len(actions) and actions.min() < 0:
        raise ValueError(f"{name} has the action {actions.min()}: discrete actions are numbered from 0")
    if first is not None:
        for field in ("frames", *COLUMNS):
            mine, theirs = (None if of is None else of.shape[1:] for of in (getattr(episode, field), getattr(first, field)))
            if mine != theirs and (pixels or field != "frames"):
                raise ValueError(f"{name} has {field} of shape {mine} each, and {first.name} of {theirs}")
    return episode


def prepared(frames: NDArray[np.uint8], image_size: Any, channels: int) -> NDArray[np.uint8]:
    """Frames (T, H, W, C) of another size and number of channels, channels first: (T, C, H, W)."""
    if image_size is not None:
        frames = np.stack([resized(frame, image_size) for frame in frames])
    if channels == 1 and frames.shape[-1] == 3:  # luma of ITU-R BT.601, as Pillow has it
        frames = np.rint(frames @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[..., None]
    elif channels == 3 and frames.shape[-1] == 1:
        frames = frames.repeat(3, axis=-1)
    return np.ascontiguousarray(frames.transpose(0, 3, 1, 2))


def completed(info: RecordingInfo, actions: list[NDArray[Any]]) -> RecordingInfo:
    """Limits or choices of the actions, found in the data where nothing says them."""
    known: dict[str, Any] = vars(info).copy()
    if actions[0].ndim == 1:
        most = int(max(part.max() for part in actions))
        if info.num_choices and most >= info.num_choices:
            raise ValueError(
                f"An action is {most}, and recording.json says num_choices={info.num_choices}: mend one of them."
            )
        if not info.num_choices:
            known["num_choices"] = most + 1
            rank_zero_info(f"Actions are integers up to {known['num_choices'] - 1}: {known['num_choices']} choices.")
        return RecordingInfo(**known)
    known["num_choices"] = 0
    if info.action_low is None or info.action_high is None:
        low, high = (np.stack([of(part, axis=0) for part in actions]) for of in (np.min, np.max))
        known |= {"action_low": low.min(axis=0).tolist(), "action_high": high.max(axis=0).tolist()}
        rank_zero_info(f"Actions are scaled from the limits that occur: {known['action_low']} to {known['action_high']}.")
    return RecordingInfo(**known)


def scaled(actions: NDArray[Any], info: RecordingInfo) -> NDArray[np.float32]:
    """Actions in [-1, 1], or one-hot vectors: (T, A) or (T,) -> (T, A)."""
    if info.num_choices:
        return np.eye(info.num_choices, dtype=np.float32)[actions]
    assert info.action_low is not None and info.action_high is not None
    low, high = np.asarray(info.action_low, np.float64), np.asarray(info.action_high, np.float64)
    half = np.where(high > low, (high - low) / 2, 1)  # what never changes says nothing, and stays 0
    return np.clip((actions - (high + low) / 2) / half, -1, 1).astype(np.float32)


def table_of(part: dict[str, Any], info: RecordingInfo) -> NDArray[np.float32]:
    """The numbers of an episode next to its frames, (T + 1, K): see `COLUMNS`."""
    actions = scaled(part["actions"], info)
    columns = [np.pad(actions, ((0, 1), (0, 0)))]
    for name in ("vectors", "states"):
        if part[name] is not None:
            columns.append(np.asarray(part[name], np.float32)[: len(actions) + 1].reshape(len(actions) + 1, -1))
    if part["rewards"] is not None:
        columns.append(np.pad(np.asarray(part["rewards"], np.float32).ravel()[: len(actions)], (0, 1))[:, None])
    return np.concatenate(columns, axis=1)


def _width(values: Any, info: RecordingInfo | None) -> int:
    if values is None:
        return 0
    if info is not None and info.num_choices:
        return info.num_choices
    return 1 if np.ndim(values) == 1 else int(np.prod(np.shape(values)[1:]))
