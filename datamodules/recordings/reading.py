"""One function that reads recordings, whatever format they are in."""

import os
from pathlib import Path

from datamodules.recordings.episode import Recording
from datamodules.recordings.npz_folder import NpzFolder


def read(path: str | os.PathLike[str]) -> Recording:
    """Recorded episodes, read one at a time.

    Args:
        path: A folder of .npz files (see `datamodules.recordings.npz_folder`), an HDF5 file of stable-worldmodel or LeWM, a
            Minari data set, or a LeRobot v3 data set.

    Raises:
        FileNotFoundError: There is nothing at that path.
        ValueError: It is none of these.
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"There is no recording at {place}.")
    if place.is_file():
        from datamodules.recordings.hdf5 import HDF5File

        return HDF5File(place)
    if (place / "meta" / "info.json").is_file():
        from datamodules.recordings.lerobot import LeRobotFolder

        return LeRobotFolder(place)
    if (place / "data" / "metadata.json").is_file() or (place / "metadata.json").is_file():
        from datamodules.recordings.minari import MinariFolder

        return MinariFolder(place)
    return NpzFolder(place)
