"""Data sets of LeRobot v3.0: episodes that share tables and videos."""

import io
import json
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_recordings import complaint, floats, listed, reopened, same

from datamodules.recordings import RecordingInfo, read
from datamodules.recordings.lerobot import LeRobotFolder, _state_names

FPS = 10
CAMERAS = ("observation.images.side", "observation.images.top")
ROWS = (30, 25, 12)
"""Lengths of the episodes: two in the first video and the first table, one in the second ones."""


def colors(seed: int, count: int) -> np.ndarray:
    """Flat colors far enough from each other that a video's losses do not mix them up."""
    return np.random.default_rng(seed).integers(1, 7, (count, 3)) * 36


def write_video(path: Path, colors: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "10", "bf": "3", "g": "20"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for color in colors:
            pixels = np.broadcast_to(color.astype(np.uint8), (32, 48, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode(None))


def write_lerobot(folder: Path, in_video: bool = True, **more) -> dict[str, np.ndarray]:
    total = sum(ROWS)
    episodes = np.repeat([0, 1, 2], ROWS)
    times = np.concatenate([np.arange(length) / FPS for length in ROWS]).astype(np.float32)
    columns = {"observation.state": floats(total, 2), "action": floats(total, 3), "next.reward": floats(total)}
    columns |= {name: colors(number, total) for number, name in enumerate(CAMERAS)}
    kinds = {name: {"dtype": "video" if in_video else "image", "shape": [32, 48, 3]} for name in CAMERAS}
    depth = {"observation.images.depth": {"dtype": "video", "shape": [32, 48, 1], "info": {"video.is_depth_map": True}}}
    scalars = {
        "observation.state": {"dtype": "float32", "shape": [2], "names": {"motors": ["arm", "hand"]}},
        "action": {"dtype": "float32", "shape": [3], "names": None},
        "next.reward": {"dtype": "float32", "shape": [1], "names": None},
    }
    info = {"codebase_version": "v3.0", "fps": FPS, "features": kinds | depth | scalars} | more
    rows = []
    for number in range(3):
        file = number // 2
        row = {"episode_index": number, "length": ROWS[number], "data/chunk_index": 0, "data/file_index": file}
        for name in CAMERAS:
            since = ROWS[0] / FPS if number == 1 else 0.0
            row |= {f"videos/{name}/chunk_index": 0, f"videos/{name}/file_index": file}
            row |= {f"videos/{name}/from_timestamp": since, f"videos/{name}/to_timestamp": since + ROWS[number] / FPS}
        rows.append(row | {"stats/action/mean": [0.0]})
    for file, part in enumerate((slice(0, ROWS[0] + ROWS[1]), slice(ROWS[0] + ROWS[1], total))):
        table = {
            "observation.state": listed(columns["observation.state"][part]),
            "action": pa.array(list(columns["action"][part])),
            "next.reward": columns["next.reward"][part],
            "timestamp": times[part],
            "episode_index": episodes[part],
        }
        for name in CAMERAS:
            if in_video:
                write_video(folder / f"videos/{name}/chunk-000/file-00{file}.mp4", columns[name][part])
            else:
                table[name] = [{"bytes": png(color), "path": "x.png"} for color in columns[name][part]]
        (folder / "data" / "chunk-000").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), folder / "data" / "chunk-000" / f"file-00{file}.parquet")
    (folder / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows[2:]), folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    pq.write_table(pa.Table.from_pylist(rows[:2]), folder / "meta" / "episodes" / "chunk-000" / "file-001.parquet")
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    return columns


def png(color: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (48, 32), tuple(color.tolist())).save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize("in_video", [True, False])
def test_lerobot_is_read_episode_by_episode(tmp_path, in_video):
    columns = write_lerobot(tmp_path, in_video)
    recording = reopened(tmp_path)
    assert recording.names == ["episode_0", "episode_1", "episode_2"]
    assert recording.info == RecordingInfo(state_names=["arm", "hand"])
    ends = np.cumsum(ROWS)
    for number in (1, 0, 2):
        rows = slice(ends[number] - ROWS[number], ends[number])
        episode = recording.episode(number)
        same(episode.actions, columns["action"][rows][:-1])
        same(episode.vectors, columns["observation.state"][rows])
        same(episode.states, columns["observation.state"][rows])
        same(episode.rewards, columns["next.reward"][rows][:-1])
        assert episode.frames.shape == (ROWS[number], 32, 48, 3) and episode.frames.dtype == np.uint8
        wanted = columns["observation.images.side"][rows]
        off = np.abs(episode.frames.astype(int) - wanted[:, None, None]).max()
        assert off <= (14 if in_video else 0)  # neighbors are 36 apart


def test_lerobot_of_discrete_actions_alone(tmp_path):
    (tmp_path / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    (tmp_path / "data" / "chunk-000").mkdir(parents=True)
    features = {"action": {"dtype": "int64", "shape": [1]}, "observation.state": {"dtype": "float32", "shape": [1]}}
    (tmp_path / "meta" / "info.json").write_text(json.dumps({"codebase_version": "v3.1", "fps": 5, "features": features}))
    row = {"episode_index": 0, "length": 3, "data/chunk_index": 0, "data/file_index": 0}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    table = {"action": [1, 0, 2], "observation.state": np.arange(3, dtype=np.float32), "episode_index": [0, 0, 0]}
    pq.write_table(pa.table(table), tmp_path / "data" / "chunk-000" / "file-000.parquet")
    episode = read(tmp_path).episode(0)
    same(episode.actions, np.array([1, 0]))
    same(episode.vectors, np.arange(3, dtype=np.float32)[:, None])
    assert episode.frames is episode.rewards is None
    assert read(tmp_path).info.state_names == ["state"]


def test_lerobot_that_is_damaged(tmp_path):
    write_lerobot(tmp_path)
    recording = read(tmp_path)
    assert isinstance(recording, LeRobotFolder)
    recording.episodes[1]["length"] = 24
    assert complaint(recording, 1).endswith("cannot be read (it has 24 rows of meta/episodes, and 25 of data)")
    recording.episodes[1]["length"] = 25
    recording.episodes[1]["videos/observation.images.side/from_timestamp"] = 3.3
    assert "file-000.mp4 has no frame at 5.500 s, and 3 of 25 are missing" in complaint(recording, 1)
    video = tmp_path / "videos" / "observation.images.side" / "chunk-000" / "file-001.mp4"
    video.write_bytes(video.read_bytes()[:500])
    assert "episode_2" in complaint(recording, 2)
    video.unlink()
    assert "FileNotFoundError" in complaint(recording, 2)
    (tmp_path / "data" / "chunk-000" / "file-000.parquet").write_bytes(b"nothing of the kind")
    assert "ArrowInvalid" in complaint(recording, 0)


def test_lerobot_of_other_versions(tmp_path):
    (tmp_path / "meta").mkdir()
    about = {"codebase_version": "v2.1", "fps": 5, "features": {"action": {}}}
    (tmp_path / "meta" / "info.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="is in version v2.1 of LeRobot's format: convert it to v3.0"):
        read(tmp_path)
    (tmp_path / "meta" / "info.json").write_text(json.dumps(about | {"codebase_version": "v3.0"}))
    with pytest.raises(ValueError, match="holds no episode"):
        read(tmp_path)
    (tmp_path / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    pq.write_table(pa.table({"episode_index": [0]}), tmp_path / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    with pytest.raises(ValueError, match=r"file-000.parquet has no data/chunk_index, data/file_index, length"):
        read(tmp_path)
    (tmp_path / "meta" / "info.json").write_text(json.dumps(about | {"codebase_version": "v3.0", "features": {"x": {}}}))
    with pytest.raises(ValueError, match="has no action; it has x"):
        read(tmp_path)
    (tmp_path / "meta" / "info.json").write_text("{")
    with pytest.raises(ValueError, match=r"info.json cannot be read \(JSONDecodeError"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["a", "b"], ["a", "b"]),
        ({"motors": ["a", "b"]}, ["a", "b"]),
        ({"y": 1, "x": 0}, ["x", "y"]),
        (None, ["state.0", "state.1"]),
        (["one name too few"], ["state.0", "state.1"]),
    ],
)
def test_lerobot_s_names_of_states(names, wanted):
    assert _state_names({"shape": [2], "names": names}) == wanted
