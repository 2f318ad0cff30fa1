"""Writing recordings as data sets that Minari 0.5.4 and later reads."""

import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.new_folder import new_folder
from datamodules.recordings.columns import library
from datamodules.recordings.episode import Episode, RecordingInfo

METADATA_FILE = "metadata.json"
MAIN_FILE = "main_data.hdf5"
STATES = "infos/states"
"""Where states are written: with what Minari's environments say next to their observations."""

OUR_INFO = "jepa_lightning"
"""Key of the metadata under which a `RecordingInfo` stands; Minari has no use for it."""

VERSION = "0.5.4"
"""The first version of Minari that reads frames that are not encoded as JPEG."""


def write_minari(path: Path, info: RecordingInfo, episodes: Iterable[Episode]) -> None:
    """Write a Minari data set in HDF5, all at once; frames are stored as they are.

    Minari finds it by `minari.load_dataset("NAME-v0")` if `path` is NAME-v0 in the folder of its data sets
    (`MINARI_DATASETS_PATH`, ~/.minari/datasets by default), and by `minari.MinariDataset(path / "data")` wherever it is.

    Observations are the frames or the vectors, or a dictionary of both, "pixels" and "vectors". States are in the infos.
    Each episode ends in a truncation. Rewards are 0 if none were recorded, since Minari always has some; names of episodes
    are not kept.

    Args:
        path: Folder to be made.
        info: What holds for all episodes.
        episodes: The episodes, which may be read one at a time.

    Raises:
        ValueError: The folder is there already, there is no episode, one has neither frames nor vectors, or h5py is missing.
    """
    path = Path(path)
    h5py = library("h5py")
    if path.exists():
        raise ValueError(f"{path} is there already: choose another folder, or remove that one.")
    first: Episode | None = None
    number = steps = choices = 0
    with new_folder(path) as folder:
        data = folder / "data"
        data.mkdir()
        with h5py.File(data / MAIN_FILE, "w") as file:
            for number, episode in enumerate(episodes, 1):
                first = first or episode
                steps += len(episode.actions)
                choices = max(choices, 1 + int(episode.actions.max(initial=0)) if episode.actions.ndim == 1 else 0)
                _write_episode(file.create_group(f"episode_{number - 1}"), number - 1, episode)
        if first is None:
            raise ValueError("There is no episode to write.")
        metadata = {
            "total_episodes": number,
            "total_steps": steps,
            "data_format": "hdf5",
            "jpeg_encoding": False,
            "observation_space": json.dumps(_observation_space(first)),
            "action_space": json.dumps(_action_space(first, info, choices)),
            "dataset_id": _dataset_id(path),
            "dataset_size": round((data / MAIN_FILE).stat().st_size / 1e6, 1),
            "minari_version": VERSION,
            OUR_INFO: asdict(info),
        }
        spec = _env_spec(info.environment)
        (data / METADATA_FILE).write_text(json.dumps(metadata | ({"env_spec": spec} if spec else {})))


def _write_episode(group: Any, number: int, episode: Episode) -> None:
    """Fill the group of an episode."""
    steps = len(episode.actions)
    group.attrs.update({"id": number, "total_steps": steps} | ({} if episode.seed is None else {"seed": episode.seed}))
    observations = {"pixels": episode.frames, "vectors": episode.vectors}
    given = {name: values for name, values in observations.items() if values is not None}
    if not given:
        raise ValueError(f"{episode.name} has neither frames nor vectors, and Minari needs observations.")
    for name, values in given.items():
        group["observations" if len(given) == 1 else f"observations/{name}"] = values
    group["actions"] = episode.actions
    group["rewards"] = np.zeros(steps, np.float32) if episode.rewards is None else episode.rewards
    group["terminations"] = np.zeros(steps, bool)
    group["truncations"] = np.arange(steps) == steps - 1
    if episode.states is not None:
        group[STATES] = episode.states


def _observation_space(episode: Episode) -> dict[str, Any]:
    spaces = {}
    if episode.frames is not None:
        spaces["pixels"] = _box(episode.frames, 0, 255)
    if episode.vectors is not None:
        spaces["vectors"] = _box(episode.vectors, -np.inf, np.inf)
    return {"type": "Dict", "subspaces": spaces} if len(spaces) == 2 else next(iter(spaces.values()))


def _action_space(episode: Episode, info: RecordingInfo, choices: int) -> dict[str, Any]:
    """The space of the actions: as many choices as are known of or occur, or limits, infinite if none are known."""
    if episode.actions.ndim == 1:
        return {"type": "Discrete", "dtype": "int64", "start": 0, "n": int(info.num_choices or choices)}
    low = -np.inf if info.action_low is None else info.action_low
    return _box(episode.actions, low, np.inf if info.action_high is None else info.action_high)


def _box(values: Any, low: Any, high: Any) -> dict[str, Any]:
    """A Box of all but the first dimension, as Minari writes one down."""
    shape = values.shape[1:]
    limits = {name: np.broadcast_to(limit, shape).tolist() for name, limit in (("low", low), ("high", high))}
    return {"type": "Box", "dtype": str(values.dtype), "shape": list(shape)} | limits


def _dataset_id(path: Path) -> str:
    """Id that Minari finds the folder by: where it is in the folder of data sets, or its name, with a version at the end."""
    root = os.environ.get("MINARI_DATASETS_PATH") or os.path.expanduser("~/.minari/datasets")
    place = os.path.relpath(path.absolute(), Path(root).absolute()).replace(os.sep, "/")
    name = re.sub(r"[^-\w/]", "_", path.name if place.startswith("..") else place)
    return name if re.search(r"-v\d+$", name) else f"{name}-v0"


def _env_spec(environment: dict[str, Any]) -> str | None:
    """What gymnasium makes the environment from; None if it does not know it, or if an action is repeated."""
    if "id" not in environment or environment.get("action_repeat", 1) != 1:
        return None
    with suppress(Exception):  # not installed or not registered here, or arguments that JSON does not hold
        gymnasium = library("gymnasium")
        spec = gymnasium.spec(environment["id"])
        spec.kwargs = {**spec.kwargs, **environment.get("arguments", {})}
        return str(spec.to_json())
    return None
