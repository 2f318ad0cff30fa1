"""Readers of recordings: exactly what was written, the last action not used, and one sentence for what is damaged."""

import pickle
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest

from datamodules.recordings import Recording, RecordingInfo, read
from datamodules.recordings import columns as shared
from datamodules.recordings.columns import as_actions
from datamodules.recordings.hdf5 import HDF5File

RNG = np.random.default_rng(0)


def same(found, wanted) -> None:
    assert (found is None) == (wanted is None)
    if wanted is not None:
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        np.testing.assert_array_equal(found, wanted)


def images(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def floats(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def listed(values: np.ndarray) -> pa.Array:
    kind = pa.list_(pa.from_numpy_dtype(values.dtype), list_size=values.shape[1])
    return pa.FixedSizeListArray.from_arrays(values.reshape(-1), type=kind)


def reopened(path: Path) -> Recording:
    """A recording as a worker process has it."""
    return pickle.loads(pickle.dumps(read(path)))


def complaint(recording: Recording, number: int) -> str:
    """What is said of an episode that cannot be read: one sentence that names it, whatever the library says."""
    with pytest.raises(ValueError) as caught:
        recording.episode(number)
    said = str(caught.value)
    assert said.startswith(recording.names[number]) and "\n" not in said
    return said


LENGTHS = (4, 3, 1)


def swm_columns() -> dict[str, np.ndarray]:
    rows = sum(LENGTHS)
    columns = {
        "pixels": images(rows, 6, 8, 3),
        "goal": images(rows, 6, 8, 3),
        "action": floats(rows, 2),
        "reward": RNG.normal(size=rows),
        "state": floats(rows, 2),
        "proprio": floats(rows, 3),
        "distance": RNG.normal(size=rows),
        "render_time": RNG.normal(size=rows),
        "goal_state": np.repeat(floats(3, 2), LENGTHS, axis=0),
        "observation": np.repeat(floats(3, 5), LENGTHS, axis=0),  # as World.collect writes what is a tensor
        "step_idx": np.arange(rows),
        "terminated": np.zeros(rows, bool),
    }
    return columns | {"ep_len": np.array(LENGTHS, np.int32), "ep_offset": np.array([0, 4, 7], np.int64)}


def write_hdf5(path: Path, columns: dict[str, np.ndarray]) -> Path:
    with h5py.File(path, "w", libver="latest") as file:
        for name, values in columns.items():
            file.create_dataset(name, data=values, chunks=(1, *values.shape[1:]))
    return path


def test_hdf5_is_read_without_the_last_actions(tmp_path):
    columns = swm_columns()
    columns["action"][[3, 6, 7]] = np.nan  # those that lead nowhere
    columns["reward"][[0, 4, 7]] = np.nan  # those of steps into first rows
    recording = reopened(write_hdf5(tmp_path / "a.h5", columns))
    assert recording.names == ["episode_0", "episode_1", "episode_2"]
    assert recording.info == RecordingInfo(
        state_names=["distance", "proprio.0", "proprio.1", "proprio.2", "state.0", "state.1"]
    )
    for number, rows in enumerate((slice(0, 4), slice(4, 7), slice(7, 8))):
        episode = recording.episode(number)
        assert episode.name == f"episode_{number}" and episode.seed is None
        same(episode.frames, columns["pixels"][rows])
        same(episode.actions, columns["action"][rows][:-1])
        same(episode.vectors, columns["proprio"][rows])
        state = [columns["distance"][rows, None], columns["proprio"][rows], columns["state"][rows]]
        same(episode.states, np.concatenate(state, axis=1).astype(np.float32))
        same(episode.rewards, columns["reward"][rows][1:].astype(np.float32))


def test_hdf5_with_little_in_it(tmp_path):
    columns = {
        "action": np.arange(5),
        "ep_len": np.array([5]),
        "ep_offset": np.array([0]),
        "pixels.side": images(5, 4, 4, 3),
    }
    recording = read(write_hdf5(tmp_path / "a.h5", columns))
    episode = recording.episode(0)
    same(episode.actions, np.arange(4))
    same(episode.frames, columns["pixels.side"])
    assert episode.vectors is episode.states is episode.rewards is None
    assert recording.info.state_names == []


def test_hdf5_columns_that_change_in_one_episode_only_are_states(tmp_path):
    rows = np.zeros((80, 2), np.float32)
    rows[-1, 1] = 1
    columns = {"action": floats(80, 1), "ep_len": np.full(40, 2), "ep_offset": np.arange(0, 80, 2), "door": rows}
    same(read(write_hdf5(tmp_path / "a.h5", columns)).episode(39).states, rows[-2:])


def test_hdf5_that_is_damaged(tmp_path):
    columns = swm_columns()
    columns["ep_offset"][1] = 6
    columns["ep_len"][2] = 0
    columns["reward"] = columns["reward"][:3]
    recording = read(write_hdf5(tmp_path / "a.h5", columns))
    assert "3 of reward" in complaint(recording, 0)
    assert complaint(recording, 1) == "episode_1 of a.h5 cannot be read (it should have the rows 6 to 9 of 8)"
    assert "rows 7 to 7" in complaint(recording, 2)
    (tmp_path / "b.h5").write_bytes((tmp_path / "a.h5").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"b.h5 cannot be read \(OSError"):
        read(tmp_path / "b.h5")
    del columns["ep_len"]
    with pytest.raises(ValueError, match="it has no ep_len, but action, "):
        read(write_hdf5(tmp_path / "a.h5", columns))
    empty = {"action": floats(1, 1), "ep_len": np.zeros(0, int), "ep_offset": np.zeros(0, int)}
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file.update(empty)
    with pytest.raises(ValueError, match="holds no episode"):
        read(tmp_path / "c.h5")


def test_hdf5_with_a_filter_that_is_missing(tmp_path):
    path = write_hdf5(tmp_path / "a.h5", {"action": floats(4, 2), "ep_len": np.array([4]), "ep_offset": np.array([0])})
    with h5py.File(path, "a") as file:
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_chunk((4, 2, 2, 3))
        settings.set_filter(300, h5py.h5z.FLAG_OPTIONAL)  # of the numbers that are kept for tests
        space = h5py.h5s.create_simple((4, 2, 2, 3))
        pixels = h5py.h5d.create(file.id, b"pixels", h5py.h5t.NATIVE_UINT8, space, settings)
        pixels.write_direct_chunk((0, 0, 0, 0), b"compressed")
    assert "pip install hdf5plugin" in complaint(HDF5File(path), 0)


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    path = write_hdf5(tmp_path / "a.h5", swm_columns())

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(shared.importlib, "import_module", absent)
    with pytest.raises(ValueError, match=r'needs h5py: pip install "jepa-lightning\[data\]"'):
        read(path)


def test_actions_of_several_integers_are_refused():
    same(as_actions(np.array([[1], [0]])), np.array([1, 0]))
    same(as_actions(np.zeros((2, 3, 2), np.float32)), np.zeros((2, 6), np.float32))
    with pytest.raises(ValueError, match="each of its actions is of 2 integers"):
        as_actions(np.zeros((3, 2), int))
