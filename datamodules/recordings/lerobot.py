"""A LeRobot data set, v3.0: tables in Parquet files, and videos, each of many episodes.

`observation.state` are the vectors and the states, `action` the actions, `next.reward` the rewards. The frames are those of
the first camera by name, `observation.image` or `observation.images.*`, from a video or from the table. Of the N rows of an
episode all are observations, and the last action, which leads nowhere, is left out.
"""

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from datamodules.recordings.columns import as_actions, as_vectors, decode_image, library, reading, same_length, scalar_names
from datamodules.recordings.episode import Episode, RecordingInfo

STATE, ACTION, REWARD = "observation.state", "action", "next.reward"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
"""Where files are if meta/info.json does not say it."""

REORDERED = 8
"""Number of frames by which a video may be stored in another order than it is shown: how much earlier to seek."""


class LeRobotFolder:
    """Episodes of a LeRobot data set, named by their numbers.

    Args:
        folder: Folder of the data set, with meta, data and videos.

    Raises:
        ValueError: Its metadata cannot be read, it is of another version, or it has no actions; or pyarrow is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        library("pyarrow.parquet")
        with reading(str(folder / "meta" / "info.json")):
            info = json.loads((folder / "meta" / "info.json").read_text())
            features, self.fps = info["features"], float(info["fps"])
            self.data_path = info.get("data_path") or DATA_PATH
            self.video_path = info.get("video_path") or VIDEO_PATH
        version = str(info.get("codebase_version", ""))
        if not version.startswith("v3."):
            raise ValueError(
                f"{folder} is in version {version or 'unknown'} of LeRobot's format: convert it to v3.0, by LeRobot's "
                "script convert_dataset_v21_to_v30."
            )
        if ACTION not in features:
            raise ValueError(f"{folder} has no {ACTION}; it has {', '.join(features)}.")
        self.camera = next((name for name in sorted(features) if _is_camera(name, features[name])), None)
        self.in_video = self.camera is not None and features[self.camera]["dtype"] == "video"
        self.columns = [name for name in (STATE, ACTION, REWARD) if name in features]
        with reading(str(folder / "meta" / "episodes")):
            self.episodes = self._episodes()
        if not self.episodes:
            raise ValueError(f"{folder} holds no episode.")
        self.names = [f"episode_{row['episode_index']}" for row in self.episodes]
        self.info = RecordingInfo(state_names=_state_names(features[STATE]) if STATE in features else [])

    def _episodes(self) -> list[dict[str, Any]]:
        """What meta/episodes says of each episode, without its many columns of statistics."""
        parquet = library("pyarrow.parquet")
        columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        if self.in_video:
            columns += [f"videos/{self.camera}/{column}" for column in ("chunk_index", "file_index", "from_timestamp")]
        rows: list[dict[str, Any]] = []
        for file in sorted((self.folder / "meta" / "episodes").glob("*/*.parquet")):
            table = parquet.ParquetFile(file).read(columns, use_threads=False)
            missing = set(columns) - set(table.column_names)
            if missing:
                raise ValueError(f"{file.name} has no {', '.join(sorted(missing))}")
            rows += table.to_pylist()
        return sorted(rows, key=lambda row: row["episode_index"])

    def episode(self, number: int) -> Episode:
        """Read an episode; raises a ValueError that names it if it cannot be read."""
        name, row = self.names[number], self.episodes[number]
        with reading(f"{name} of {self.folder.name}"):
            table = self._table(row)
            columns = {column: _dense(table[column].to_numpy()) for column in self.columns}
            actions = as_actions(columns[ACTION])
            vectors = as_vectors([columns[STATE]]) if STATE in columns else None
            rewards = columns[REWARD].astype(np.float32).reshape(len(table)) if REWARD in columns else None
            frames = None
            if self.in_video:
                frames = self._video_frames(row, table["timestamp"].to_numpy().astype(np.float64))
            elif self.camera is not None:
                frames = np.stack([decode_image(image["bytes"]) for image in table[self.camera].to_pylist()])
            return Episode(
                name,
                actions[:-1],
                frames=frames,
                vectors=vectors,
                states=vectors,
                rewards=None if rewards is None else rewards[:-1],
            )

    def _table(self, row: dict[str, Any]) -> Any:
        """The rows of an episode, of the file that holds them among those of other episodes."""
        place = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
        columns = self.columns + ([] if self.camera is None else ["timestamp" if self.in_video else self.camera])
        # Rows are found by their episode: numbers of rows count from the start of the data set, not of the file.
        found = library("pyarrow.parquet").read_table(
            self.folder / self.data_path.format(**place),
            columns=columns,
            filters=[("episode_index", "=", row["episode_index"])],
            use_threads=False,
            partitioning=None,
        )
        same_length(**{"meta/episodes": range(row["length"]), "data": found})
        if not len(found):
            raise ValueError("it has no rows")
        return found

    def _video_frames(self, row: dict[str, Any], since: NDArray[np.float64]) -> NDArray[np.uint8]:
        """Frames (N, H, W, 3) of an episode.

        Args:
            row: What meta/episodes says of it.
            since: (N,): seconds since the start of the episode.
        """
        place = {part: row[f"videos/{self.camera}/{part}"] for part in ("chunk_index", "file_index")}
        path = self.folder / self.video_path.format(video_key=self.camera, **place)
        return _decode(path, since + row[f"videos/{self.camera}/from_timestamp"], 1 / self.fps)


def _decode(path: Path, seconds: NDArray[np.float64], interval: float) -> NDArray[np.uint8]:
    """The frames of a video that are nearest to some points in time: (N, H, W, 3).

    Args:
        path: The video.
        seconds: (N,): points in time, in order.
        interval: Seconds from frame to frame; no frame may be half of that away from its point.

    Raises:
        ValueError: There is no frame near one of them.
    """
    pixels: NDArray[np.uint8] | None = None
    distances = np.full(len(seconds), interval / 2)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        start = max(0.0, float(seconds[0]) - REORDERED * interval)
        container.seek(int(start / float(stream.time_base or 1)), stream=stream)  # to the key frame before it
        for frame in container.decode(stream):
            if frame.time is None:
                continue
            if frame.time > seconds[-1] + interval / 2:
                break
            away = np.abs(seconds - frame.time)
            nearer = away < distances
            if nearer.any():
                image = frame.to_ndarray(format="rgb24")
                if pixels is None:
                    pixels = np.zeros((len(seconds), *image.shape), np.uint8)
                pixels[nearer], distances[nearer] = image, away[nearer]
    lost = seconds[distances == interval / 2]
    if pixels is None or len(lost):
        raise ValueError(f"{path.name} has no frame at {lost[0]:.3f} s, and {len(lost)} of {len(seconds)} are missing")
    return pixels


def _is_camera(name: str, feature: dict[str, Any]) -> bool:
    """Whether a feature is of images, other than those of depths."""
    about = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
    depth = about.get("is_depth_map") or about.get("video.is_depth_map")
    is_image = name == "observation.image" or name.startswith("observation.images.")
    return is_image and feature.get("dtype") in ("video", "image") and not depth


def _state_names(feature: dict[str, Any]) -> list[str]:
    """Names of the scalars of the state: those of the data set, or numbers."""
    names: Any = feature.get("names") or []
    if isinstance(names, dict):  # {"motors": [...]}, or {"x": 0, "y": 1}
        lists = [value for value in names.values() if isinstance(value, list)]
        names = [name for part in lists for name in part] if lists else sorted(names, key=names.__getitem__)
    if len(names) == int(np.prod(feature["shape"])):
        return [str(name) for name in names]
    return scalar_names("state", feature["shape"])


def _dense(values: NDArray[Any]) -> NDArray[Any]:
    """(N, ...) of N arrays, however deep they lie in each other; (N,) stay what they are."""
    return np.stack([_dense(value) for value in values]) if values.dtype == object else values
