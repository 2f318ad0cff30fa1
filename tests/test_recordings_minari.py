"""Data sets of Minari: read as they are laid out, and written so that they are read again."""

import io
import json
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from PIL import Image
from test_recordings import RNG, complaint, floats, images, listed, reopened, same

from datamodules.recordings import Episode, RecordingInfo, read
from datamodules.recordings.minari import MinariFolder, write_minari


def box(shape, low, high, dtype="float32"):
    limits = {"low": np.full(shape, low).tolist(), "high": np.full(shape, high).tolist()}
    return {"type": "Box", "dtype": dtype, "shape": list(shape)} | limits


CAMERA = box((32, 40, 3), 0, 255, "uint8")
DEEP = {
    "type": "Dict",
    "subspaces": {
        "mission": {"type": "Text", "max_length": 9, "min_length": 1, "charset": "abc"},
        "robot": {"type": "Dict", "subspaces": {"q": box((2, 2), -1, 1), "t": box((1,), -1, 1, "float64")}},
        "camera": CAMERA,
        "more": {"type": "Tuple", "subspaces": [box((), -1, 1), {"type": "Discrete", "n": 3, "start": 0}]},
    },
}
DISCRETE = {"type": "Discrete", "dtype": "int64", "start": 2, "n": 4}


def metadata(folder: Path, observations, actions, episodes: int = 2, **more) -> None:
    (folder / "data").mkdir(parents=True)
    spaces = {"observation_space": json.dumps(observations), "action_space": json.dumps(actions)}
    about = {"total_episodes": episodes, "data_format": "hdf5", "minari_version": "0.5.4"} | spaces | more
    (folder / "data" / "metadata.json").write_text(json.dumps(about))


def jpeg(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG")
    return file.getvalue()


def decoded(images: np.ndarray) -> np.ndarray:
    return np.stack([np.array(Image.open(io.BytesIO(jpeg(image)))) for image in images])


def group_of(path: Path, number: int, steps: int, actions) -> h5py.Group:
    file = h5py.File(path / "data" / "main_data.hdf5", "a")
    group = file.create_group(f"episode_{number}")
    group["actions"] = actions
    group["rewards"] = np.arange(steps, dtype=np.float64)
    return group


def test_minari_of_vectors(tmp_path):
    spec = json.dumps({"id": "Hopper-v5", "kwargs": {"frame_skip": 2}, "additional_wrappers": []})
    metadata(tmp_path / "a", box((3,), -np.inf, np.inf, "float64"), box((2,), -2, 3), env_spec=spec)
    written = []
    for number, steps in enumerate((4, 2)):
        written.append((RNG.normal(size=(steps + 1, 3)), floats(steps, 2)))
        group = group_of(tmp_path / "a", number, steps, written[-1][1])
        group["observations"] = written[-1][0]
        if number:
            group.attrs["seed"] = 7
        group.file.close()
    recording = reopened(tmp_path / "a")
    assert recording.names == ["episode_0", "episode_1"]
    assert recording.info == RecordingInfo(
        action_low=[-2, -2],
        action_high=[3, 3],
        num_choices=0,
        state_names=["observation.0", "observation.1", "observation.2"],
        environment={"id": "Hopper-v5", "arguments": {"frame_skip": 2}},
    )
    for number, (vectors, actions) in enumerate(written):
        episode = recording.episode(number)
        assert episode.frames is None and episode.seed == (7 if number else None)
        same(episode.vectors, vectors.astype(np.float32))
        same(episode.states, episode.vectors)
        same(episode.actions, actions)
        same(episode.rewards, np.arange(len(actions), dtype=np.float32))


@pytest.mark.parametrize("encoded", [True, False])
def test_minari_of_images_and_discrete_actions(tmp_path, encoded):
    metadata(tmp_path / "a", CAMERA, DISCRETE, 1, jpeg_encoding=encoded)
    frames, actions = images(4, 32, 40, 3), np.array([2, 5, 3])
    group = group_of(tmp_path / "a", 0, 3, actions)
    if encoded:
        group.create_dataset("observations", (4,), h5py.vlen_dtype(np.uint8))
        for number, frame in enumerate(frames):
            group["observations"][number] = np.frombuffer(jpeg(frame), np.uint8)
    else:
        group["observations"] = frames
    group.file.close()
    recording = read(tmp_path / "a")
    assert recording.info == RecordingInfo(num_choices=4, state_names=[])
    episode = recording.episode(0)
    same(episode.frames, decoded(frames) if encoded else frames)
    same(episode.actions, actions - 2)
    assert episode.vectors is episode.states is None


def test_minari_of_nested_observations(tmp_path):
    metadata(tmp_path / "a", DEEP, box((1,), -np.inf, 1), 1, jpeg_encoding=False)
    frames, q, t, more = images(3, 32, 40, 3), floats(3, 2, 2), RNG.normal(size=(3, 1)), floats(3)
    group = group_of(tmp_path / "a", 0, 2, floats(2, 1))
    for name, values in {"camera": frames, "robot/q": q, "robot/t": t, "more/_index_0": more}.items():
        group[f"observations/{name}"] = values
    group["observations/mission"] = ["a", "b", "c"]
    group["observations/more/_index_1"] = np.arange(3)
    group.file.close()
    recording = read(tmp_path / "a")
    assert recording.info.state_names == ["robot.q.0", "robot.q.1", "robot.q.2", "robot.q.3", "robot.t", "more.0"]
    assert recording.info.action_low is None and recording.info.action_high == [1]
    episode = recording.episode(0)
    same(episode.frames, frames)
    same(episode.vectors, np.concatenate([q.reshape(3, 4), t, more[:, None]], axis=1).astype(np.float32))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_minari_of_tables(tmp_path, kind):
    metadata(tmp_path / "a", DEEP, DISCRETE, data_format=kind)
    written = []
    for number, steps in enumerate((3, 2)):
        frames, q, t, more = (
            images(steps + 1, 32, 40, 3),
            floats(steps + 1, 4),
            RNG.normal(size=(steps + 1, 1)),
            floats(steps + 1),
        )
        actions = RNG.integers(2, 6, steps)
        written.append((frames, q, t, more, actions))
        robot = pa.StructArray.from_arrays([listed(q), listed(t)], names=["q", "t"])
        pair = pa.StructArray.from_arrays([pa.array(more), pa.array(np.arange(steps + 1))], names=["0", "1"])
        encoded = pa.array([jpeg(frame) for frame in frames], pa.binary())
        parts = [pa.array(["a"] * (steps + 1)), robot, encoded, pair]
        columns = {
            "observations": pa.StructArray.from_arrays(parts, names=["mission", "robot", "camera", "more"]),
            "actions": np.pad(actions, (0, 1)),  # Minari fills the last row
            "rewards": np.arange(steps + 1.0),
            "episode_id": np.full(steps + 1, number, np.int32),
        }
        ds.write_dataset(
            pa.RecordBatch.from_pydict(columns),
            tmp_path / "a" / "data",
            format=kind,
            partitioning=["episode_id"],
            existing_data_behavior="overwrite_or_ignore",
        )
        (tmp_path / "a" / "data" / str(number) / "metadata.json").write_text(json.dumps({"seed": 5} if number else {}))
    recording = reopened(tmp_path / "a")
    for number, (frames, q, t, more, actions) in enumerate(written):
        episode = recording.episode(number)
        same(episode.frames, decoded(frames))
        same(episode.vectors, np.concatenate([q, t, more[:, None]], axis=1).astype(np.float32))
        same(episode.actions, actions - 2)
        same(episode.rewards, np.arange(len(actions), dtype=np.float32))
        assert episode.seed == (5 if number else None)
    next((tmp_path / "a" / "data" / "1").glob("*." + kind)).write_bytes(b"nothing of the kind")
    complaint(recording, 1)


def test_minari_of_gray_images(tmp_path):
    metadata(tmp_path / "a", box((8, 9), 0, 255, "uint8"), DISCRETE, 1)  # too small for Minari to encode them
    frames = images(3, 8, 9)
    group = group_of(tmp_path / "a", 0, 2, [2, 2])
    group["observations"] = frames
    group.file.close()
    same(read(tmp_path / "a").episode(0).frames, frames[..., None])


def test_minari_that_is_damaged(tmp_path):
    metadata(tmp_path / "a", box((3,), -1, 1), box((2,), -2, 3), 3)
    group = group_of(tmp_path / "a", 0, 4, floats(4, 2))
    group["observations"] = floats(4, 3)
    group = group.file.create_group("episode_1")
    group.file.close()
    recording = read(tmp_path / "a")
    said = "episode_0 of a cannot be read (it has 4 observations, 4 actions and 4 rewards)"
    assert complaint(recording, 0) == said
    assert "KeyError" in complaint(recording, 1)
    assert "KeyError" in complaint(recording, 2)
    (tmp_path / "a" / "data" / "main_data.hdf5").write_bytes(b"nothing of the kind")
    assert "OSError" in complaint(recording, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"action_space": json.dumps({"type": "MultiBinary", "n": 3})}, "its actions are of a MultiBinary space"),
        ({"total_episodes": 0}, "holds no episode"),
        ({"data_format": "zarr"}, "its data_format is zarr"),
    ],
)
def test_minari_of_unknown_kinds(tmp_path, change, said):
    metadata(tmp_path / "a", box((3,), -1, 1), DISCRETE, **change)
    with pytest.raises(ValueError, match=said):
        read(tmp_path / "a")


def test_minari_without_spaces_or_observations(tmp_path):
    metadata(tmp_path / "a", {"type": "Discrete", "n": 3, "start": 0}, DISCRETE, 1)
    group = group_of(tmp_path / "a", 0, 2, [2, 2])
    group["observations"] = np.arange(3)
    group.file.close()
    assert "neither images nor floats" in complaint(read(tmp_path / "a" / "data"), 0)
    (tmp_path / "a" / "data" / "metadata.json").write_text('{"total_episodes": 1, "action_space": "{}"}')
    with pytest.raises(ValueError, match="it has no observation_space"):
        read(tmp_path / "a")


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("given", [{"frames"}, {"vectors", "states"}, {"frames", "vectors", "states"}])
def test_what_is_written_for_minari_is_read_again(tmp_path, discrete, given):
    episodes = []
    for number, steps in enumerate((3, 2)):
        actions = RNG.integers(0, 3, steps) if discrete else floats(steps, 2)
        arrays = {"frames": images(steps + 1, 33, 34, 3), "vectors": floats(steps + 1, 2), "states": floats(steps + 1, 3)}
        kept = {name: arrays[name] for name in given}
        rewards = floats(steps)
        episodes.append(Episode(f"episode_{number}", actions, **kept, rewards=rewards, seed=number or None))
    info = RecordingInfo(
        action_low=None if discrete else [-4, -4],
        action_high=None if discrete else [4, 5],
        num_choices=3 if discrete else 0,
        state_names=["x", "y", "z"] if "states" in given else [],
        environment={"id": "Unknown-v0", "action_repeat": 2},
    )
    write_minari(tmp_path / "my robot", info, iter(episodes))
    recording = reopened(tmp_path / "my robot")
    assert isinstance(recording, MinariFolder)
    assert recording.info == info and recording.names == ["episode_0", "episode_1"]
    for number, wanted in enumerate(episodes):
        found = recording.episode(number)
        assert (found.name, found.seed) == (wanted.name, wanted.seed)
        for name in ("actions", "frames", "vectors", "states", "rewards"):
            same(getattr(found, name), getattr(wanted, name))
    about = json.loads((tmp_path / "my robot" / "data" / "metadata.json").read_text())
    assert (about["total_episodes"], about["total_steps"], about["jpeg_encoding"]) == (2, 5, False)
    assert about["dataset_id"] == "my_robot-v0"
    assert json.loads(about["action_space"]) == (
        {"type": "Discrete", "dtype": "int64", "start": 0, "n": 3}
        if discrete
        else {"type": "Box", "dtype": "float32", "shape": [2], "low": [-4, -4], "high": [4, 5]}
    )
    with h5py.File(tmp_path / "my robot" / "data" / "main_data.hdf5") as file:
        assert file["episode_0/truncations"][:].tolist() == [False, False, True]
        assert dict(file["episode_1"].attrs) == {"id": 1, "total_steps": 2, "seed": 1}


def test_minari_is_found_by_the_place_it_is_written_to(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    write_minari(tmp_path / "lab" / "robot-v2", RecordingInfo(), [Episode("a", np.array([4, 1]), vectors=floats(3, 1))])
    about = json.loads((tmp_path / "lab" / "robot-v2" / "data" / "metadata.json").read_text())
    assert about["dataset_id"] == "lab/robot-v2"
    assert json.loads(about["action_space"])["n"] == 5
    same(read(tmp_path / "lab" / "robot-v2").episode(0).rewards, np.zeros(2, np.float32))


def test_nothing_is_left_of_a_minari_data_set_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="a has neither frames nor vectors"):
        write_minari(tmp_path / "a", RecordingInfo(), [Episode("a", floats(2, 1))])
    with pytest.raises(ValueError, match="no episode to write"):
        write_minari(tmp_path / "a", RecordingInfo(), [])
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="is there already"):
        write_minari(tmp_path / "a", RecordingInfo(), [])
