"""A data set of Minari 0.5 or 0.4, in HDF5, Parquet or Arrow files.

Of the observations, images (uint8, of 2 or 3 dimensions) are the frames; of several, the first. Floats are the vectors,
those of a dictionary joined in its order, and the states as well. What is neither, such as texts, is left out. Actions are
of a Box, or of a Discrete space, whose first choice becomes 0.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.recordings.columns import (
    as_actions,
    as_vectors,
    decode_image,
    library,
    reading,
    same_length,
    scalar_names,
)
from datamodules.recordings.episode import Episode, RecordingInfo
from datamodules.recordings.minari_writer import MAIN_FILE, METADATA_FILE, OUR_INFO, STATES, write_minari

__all__ = ["MinariFolder", "write_minari"]


class MinariFolder:
    """Episodes of a Minari data set, named by their numbers.

    Args:
        folder: Folder of the data set, or the folder "data" in it.

    Raises:
        ValueError: Its metadata cannot be read, or its actions are neither of a Box nor of a Discrete space; or h5py or
            pyarrow, whichever it needs, is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "data" if (folder / "data" / METADATA_FILE).is_file() else folder
        with reading(str(self.folder / METADATA_FILE)):
            metadata = json.loads((self.folder / METADATA_FILE).read_text())
            missing = {"observation_space", "action_space", "total_episodes"} - set(metadata)
            if missing:
                raise ValueError(f"it has no {' and no '.join(sorted(missing))}")
            self.format = metadata.get("data_format", "hdf5")
            if self.format not in ("hdf5", "parquet", "arrow"):
                raise ValueError(f"its data_format is {self.format}: hdf5, parquet and arrow are known here")
            self.jpeg = metadata.get("jpeg_encoding", True)
            self.observation_space = json.loads(metadata["observation_space"])
            self.action_space = json.loads(metadata["action_space"])
            self.names = [f"episode_{number}" for number in range(metadata["total_episodes"])]
            self.ours = OUR_INFO in metadata
            self.info = RecordingInfo(**metadata[OUR_INFO]) if self.ours else self._info(metadata)
        if not self.names:
            raise ValueError(f"{folder} holds no episode.")
        library("h5py" if self.format == "hdf5" else "pyarrow.dataset")

    def episode(self, number: int) -> Episode:
        """Read an episode; raises a ValueError that names it if it cannot be read."""
        name = self.names[number]
        with reading(f"{name} of {self.folder.parent.name if self.folder.name == 'data' else self.folder.name}"):
            return self._from_hdf5(name) if self.format == "hdf5" else self._from_arrow(name, number)

    def _from_hdf5(self, name: str) -> Episode:
        """An episode's group of the file, which is opened anew: an open one can be neither pickled nor forked."""
        with library("h5py").File(self.folder / MAIN_FILE, "r") as file:
            group = file[name]
            leaves = _leaves(self.observation_space, group["observations"], _member_of_group)
            return self._episode(
                name,
                [(space, node[()]) for _, space, node in leaves],
                group["actions"][()],
                group["rewards"][()],
                states=group[STATES][()] if self.ours and STATES in group else None,
                seed=group.attrs.get("seed"),
            )

    def _from_arrow(self, name: str, number: int) -> Episode:
        """An episode's folder of tables. Their last row has an observation, and an action that stands for nothing."""
        folder, about = self.folder / str(number), self.folder / str(number) / METADATA_FILE
        dataset = library("pyarrow.dataset").dataset(folder, format=self.format, ignore_prefixes=["_", ".", METADATA_FILE])
        table = dataset.to_table(["observations", "actions", "rewards"], use_threads=False)
        observations, actions, rewards = (table[column].combine_chunks() for column in table.column_names)
        leaves = _leaves(self.observation_space, observations, _member_of_struct)
        return self._episode(
            name,
            [(space, _values(node, space)) for _, space, node in leaves],
            _values(actions, self.action_space)[:-1],
            _values(rewards, {})[:-1],
            seed=json.loads(about.read_text()).get("seed") if about.is_file() else None,
        )

    def _episode(
        self,
        name: str,
        leaves: list[Any],
        actions: NDArray[Any],
        rewards: NDArray[Any],
        states: NDArray[Any] | None = None,
        seed: Any = None,
    ) -> Episode:
        """An episode of observations, each with its space, and of what else was recorded."""
        images = [(space, values) for space, values in leaves if _is_image(space)]
        vectors = as_vectors([values for space, values in leaves if _is_float(space)])
        frames = self._frames(*images[0]) if images else None
        if frames is None and vectors is None:
            raise ValueError("its observations are neither images nor floats")
        rows = {"frames": frames, "vectors": vectors, "states": states}
        same_length(**{column: values for column, values in rows.items() if values is not None})
        steps = len(next(values for values in rows.values() if values is not None)) - 1
        if not len(actions) == len(rewards) == steps:
            raise ValueError(f"it has {steps + 1} observations, {len(actions)} actions and {len(rewards)} rewards")
        if self.action_space["type"] == "Box":
            actions = as_actions(actions if actions.dtype.kind == "f" else actions.astype(np.float32))
        else:
            actions = as_actions(actions - self.action_space.get("start", 0))
        return Episode(
            name,
            actions,
            frames=frames,
            vectors=vectors,
            states=states if self.ours else vectors,
            rewards=rewards.astype(np.float32),
            seed=None if seed is None else int(seed),
        )

    def _frames(self, space: dict[str, Any], values: Any) -> NDArray[np.uint8]:
        """Frames (T + 1, H, W, C) of an array of them, or of encoded ones."""
        if self.jpeg and _is_encoded(space):
            return np.stack([decode_image(bytes(value)) for value in values])
        return values[..., None] if values.ndim == 3 else values

    def _info(self, metadata: dict[str, Any]) -> RecordingInfo:
        """What the metadata say."""
        kind = self.action_space["type"]
        if kind not in ("Box", "Discrete"):
            raise ValueError(f"its actions are of a {kind} space, and only Box and Discrete are known here")
        low, high = (_limits(self.action_space, limit) for limit in ("low", "high")) if kind == "Box" else (None, None)
        names = [
            scalar
            for name, space, _ in _leaves(self.observation_space, None, lambda node, key: None)
            if _is_float(space)
            for scalar in scalar_names(name or "observation", space["shape"])
        ]
        spec = json.loads(metadata.get("env_spec") or "{}")
        return RecordingInfo(
            action_low=low,
            action_high=high,
            num_choices=self.action_space["n"] if kind == "Discrete" else 0,
            state_names=names,
            environment={"id": spec["id"], "arguments": spec.get("kwargs", {})} if spec else {},
        )


def _leaves(space: dict[str, Any], node: Any, member: Any, name: str = "") -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Names, spaces and data of the observations, however deep they lie in dictionaries and tuples."""
    if space["type"] not in ("Dict", "Tuple"):
        yield name, space, node
        return
    spaces = space["subspaces"]
    for key, sub in spaces.items() if space["type"] == "Dict" else enumerate(spaces):
        yield from _leaves(sub, member(node, key), member, f"{name}.{key}" if name else str(key))


def _member_of_group(group: Any, key: str | int) -> Any:
    return group[f"_index_{key}" if isinstance(key, int) else key]


def _member_of_struct(struct: Any, key: str | int) -> Any:
    return struct.field(str(key))


def _values(array: Any, space: dict[str, Any]) -> Any:
    """An Arrow array as numpy has it: (N,), or (N, ...) for lists; a list of bytes for encoded images."""
    if hasattr(array, "values"):
        return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), *space["shape"])
    return array.to_pylist() if "binary" in str(array.type) else array.to_numpy(zero_copy_only=False)


def _is_image(space: dict[str, Any]) -> bool:
    return space["type"] == "Box" and space["dtype"] == "uint8" and len(space["shape"]) in (2, 3)


def _is_float(space: dict[str, Any]) -> bool:
    return space["type"] == "Box" and space["dtype"].startswith("float")


def _is_encoded(space: dict[str, Any]) -> bool:
    """Whether Minari encodes images of this space: not those that are small, nor those that do not reach from 0 to 255."""
    return min(space["shape"][:2]) >= 32 and not np.any(space["low"]) and bool(np.all(np.equal(space["high"], 255)))


def _limits(space: dict[str, Any], limit: str) -> list[float] | None:
    """Limits of the scalars of an action; None if there are none."""
    limits = np.broadcast_to(np.asarray(space[limit], dtype=np.float64), space["shape"]).ravel()
    return limits.tolist() if np.isfinite(limits).all() else None
