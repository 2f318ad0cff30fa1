"""A folder with a .npz file for each episode: the format that anyone can write.

    np.savez("my_recording/episode_0.npz", frames=frames, actions=actions)

`frames` (T + 1, H, W, C) uint8, `actions` (T, A) floats or (T,) integers; a last action that leads nowhere, (T + 1, A), is
left out. Optional: `vectors` (T + 1, V), `states` (T + 1, L), `rewards` (T,), `seed`. What holds for all of them may stand
in recording.json, see `RecordingInfo`; without it, limits and choices are those that occur.
"""

import json
import os
import tempfile
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

from datamodules.recordings.episode import Episode, RecordingInfo

INFO_FILE = "recording.json"
ARRAYS = ("frames", "vectors", "states", "rewards")


class NpzFolder:
    """Episodes in the .npz files of a folder, by name.

    Args:
        folder: The folder.

    Raises:
        ValueError: There is no episode in it, or its recording.json cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*.npz"))
        if not self.files:
            raise ValueError(f"{folder} holds no episode: write one .npz file for each, with frames and actions.")
        self.names = [file.name for file in self.files]
        self.info = read_info(folder)

    def episode(self, number: int) -> Episode:
        """Read an episode; raises a ValueError that names it if it cannot be read."""
        file = self.files[number]
        try:
            # Opened here, because NumPy leaves a file open that is no archive.
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{file.name} cannot be read ({type(error).__name__}: {error})") from error
        if "actions" not in found:
            raise ValueError(f"{file.name} has no actions; it has {', '.join(found) or 'nothing'}")
        seed = int(found["seed"]) if "seed" in found else None
        return Episode(file.name, found["actions"], **{name: found.get(name) for name in ARRAYS}, seed=seed)


def read_info(folder: Path) -> RecordingInfo:
    """What recording.json says; nothing if there is none.

    Raises:
        ValueError: It is no JSON, or says something that is not known.
    """
    path = folder / INFO_FILE
    if not path.is_file():
        return RecordingInfo()
    try:
        return RecordingInfo(**json.loads(path.read_text()))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it takes {', '.join(asdict(RecordingInfo()))}.") from error


def write_info(folder: Path, info: RecordingInfo) -> None:
    """Write recording.json, all at once."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{INFO_FILE}.{os.getpid()}"
    temporary.write_text(json.dumps(asdict(info), indent=2) + "\n")
    temporary.replace(folder / INFO_FILE)


def write_episode(folder: Path, episode: Episode) -> None:
    """Write an episode as a compressed .npz file of its name, all at once: no other process sees half of it."""
    arrays = {name: getattr(episode, name) for name in ("actions", *ARRAYS, "seed")}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".part", delete=False) as file:
        try:
            np.savez_compressed(file, **{name: array for name, array in arrays.items() if array is not None})
            file.flush()
            Path(file.name).chmod(0o644)
            Path(file.name).replace(folder / episode.name)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
