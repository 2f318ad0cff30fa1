"""Recorded episodes as a data module: any environment, any recording.

Shapes: B batch, T windows in time, F frames of a clip, H W pixels, C channels, A scalars of an action.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.batches import ClipBatch
from datamodules.clips import Clip, Clips, HeldOut
from datamodules.collecting import Collect, collect
from datamodules.episode_store import COLUMNS, Store, estimated_gigabytes, load
from datamodules.recordings import read
from datamodules.resumable import ResumableLoader, SingleLoaderDataModule

SPLITS = ("train", "val", "test")


class Trajectories(SingleLoaderDataModule):
    """Episodes of any length from a recording: what an environment or a robot showed, and which actions it was given.

    Training, validation and test episodes are chosen by a hash of their names, so that episodes that are added later move
    hardly any from one to another. Actions are scaled by their limits to [-1, 1]; discrete ones become one-hot vectors. If
    several steps lie between two windows (`stride`), their actions are joined: A = stride * scalars.

    >>> data = Trajectories("data/tworoom", stride=5)  # doctest: +SKIP
    >>> model = DynamicsJEPA.for_data(data, horizon=4)  # doctest: +SKIP

    Args:
        root: What `datamodules.recordings.read` reads: a folder of .npz files, an HDF5 file, a Minari or a LeRobot data set.
        collect: How the recording is made, if it is not there or was cut; see `datamodules.collecting.Collect`.
        size: Maximum number of training episodes; all by default.
        observation: What a model sees: "pixels", "vectors", or "both".
        history: Consecutive frames per window. One frame shows no velocities.
        stride: Frames from one window to the next, which is the time step of a model.
        windows: Windows of a clip T, which training samples and validation samples are.
        image_size: Height and width of the images in pixels, one number if they are equal; as recorded by default.
        channels: Number of channels of an image, 1 for gray or 3 for RGB.
        val_fraction: Fraction of the episodes for validation.
        test_fraction: Fraction of the episodes for tests, such as planning.
        batch_size: Clips per batch and process.
        num_workers: Number of processes that cut clips; 0 cuts them in the training process.
        max_gigabytes: Size of all frames above which they are kept in a file that is mapped into memory.
        cache_dir: Folder for that file; next to the recording by default.
        seed: Seed of clips, sample orders and the split.

    Raises:
        ValueError: A number out of its range, named together with what is allowed.
    """

    batch_type = ClipBatch

    def __init__(
        self,
        root: str,
        collect: Collect | None = None,
        size: int | None = None,
        observation: Literal["pixels", "vectors", "both"] = "pixels",
        history: int = 1,
        stride: int = 1,
        windows: int = 9,
        image_size: int | tuple[int, int] | None = None,
        channels: int = 3,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        batch_size: int = 64,
        num_workers: int = 0,
        max_gigabytes: float = 4.0,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in {"history": history, "stride": stride, "batch_size": batch_size, "size": size or 1}.items():
            if value < 1:
                raise ValueError(f"data.{name}={value}: give an integer of at least 1.")
        if windows < 2:
            raise ValueError(f"data.windows={windows}: at least 2, or there is no later window to predict.")
        if observation not in ("pixels", "vectors", "both"):
            raise ValueError(f"data.observation={observation!r}: choose one of pixels, vectors, both.")
        if channels not in (1, 3):
            raise ValueError(f"data.channels={channels}: choose 1 for gray or 3 for RGB.")
        for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if not 0 < fraction < 0.5:
                raise ValueError(f"data.{name}={fraction}: choose a fraction of the episodes between 0 and 0.5.")
        if seed < 0 or num_workers < 0 or not max_gigabytes >= 0:
            raise ValueError(
                f"data.seed={seed}, num_workers={num_workers}, max_gigabytes={max_gigabytes}: none may be negative."
            )
        self.root, self.collect, self.size, self.observation = root, collect, size, observation
        self.history, self.stride, self.windows, self.channels = history, stride, windows, channels
        self._asked_size = tuple(image_size) if isinstance(image_size, list) else image_size
        self.fractions = {"val": val_fraction, "test": test_fraction}
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.max_gigabytes, self.cache_dir = max_gigabytes, cache_dir
        self.clip_length = history + (windows - 1) * stride
        self._store: Store | None = None
        self._said = False

    # What a model is built for; see `jepa_lightning.DynamicsJEPA.for_data`.

    @property
    def image_size(self) -> int | tuple[int, int] | None:
        """Height and width of the images in pixels; None without images."""
        if self._asked_size is not None or self.store.frames is None:
            return self._asked_size
        height, width = self.store.frames.shape[-2:]
        return height if height == width else (height, width)

    @property
    def action_dim(self) -> int:
        """Number of scalars of an action between two windows, A."""
        return self.stride * self.store.widths["actions"]

    @property
    def num_choices(self) -> int:
        """Number of choices of a discrete action; 0 for continuous ones."""
        return self.store.info.num_choices or 0

    @property
    def vector_dim(self) -> int:
        """Number of scalars of a frame's vector, V; 0 if only pixels are observed."""
        return 0 if self.observation == "pixels" else self.store.widths["vectors"]

    @property
    def state_names(self) -> list[str]:
        """Names of the scalars of a state."""
        names, count = list(self.store.info.state_names), self.store.widths["states"]
        return names if len(names) == count else [f"state.{number}" for number in range(count)]

    @property
    def dynamics(self) -> dict[str, Any]:
        """What a world model of this data learns the laws of: where it was recorded, limits and the time step."""
        info, environment = self.store.info, self.store.info.environment
        limits = {"action_low": info.action_low, "action_high": info.action_high, "num_choices": info.num_choices}
        origin = {name: environment.get(name) for name in ("id", "arguments", "action_repeat")}
        return json.loads(json.dumps(limits | origin | {"stride": self.stride}))

    @property
    def store(self) -> Store:
        """All episodes, read (and recorded) at the first use."""
        if self._store is None:
            if self.collect is not None:
                collect(self.collect, self.root)
            recording = read(self.root)
            pixels = self.observation != "vectors"
            large = pixels and estimated_gigabytes(recording, self._asked_size, self.channels) > self.max_gigabytes
            store = load(recording, self._asked_size, self.channels, pixels, self._cache() if large else None)
            if self.observation != "pixels" and not store.widths["vectors"]:
                raise ValueError(f"data.observation={self.observation!r}: {self.root} holds no vectors, only frames.")
            self._store = store
        return self._store

    def _cache(self) -> Path:
        """The folder of the mapped frames of this very recording, size and channels."""
        place = Path(self.root)
        folder = Path(self.cache_dir) if self.cache_dir else place.with_name(f"{place.name}.frames")
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
        key = json.dumps([stats, self._asked_size, self.channels])
        return folder / hashlib.sha256(key.encode()).hexdigest()[:16]

    def prepare_data(self) -> None:
        """Record and read the episodes in one process, before the others need them."""
        _ = self.store

    def episodes(self, split: str) -> list[int]:
        """Numbers of the episodes of "train", "val" or "test", in the order of their names.

        Raises:
            ValueError: Too few episodes for all three.
        """
        store = self.store
        order = sorted(range(len(store.names)), key=lambda number: crc32(f"{self.seed}/{store.names[number]}".encode()))
        counts = {name: max(1, round(fraction * len(order))) for name, fraction in self.fractions.items()}
        if len(order) <= sum(counts.values()):
            raise ValueError(f"{self.root} holds {len(order)} episodes: training, validation and test need one each.")
        first, second = counts["val"], counts["val"] + counts["test"]
        chosen = {"val": order[:first], "test": order[first:second], "train": order[second:][: self.size]}
        return sorted(chosen[split])

    def _clips(self, split: str) -> Clips:
        """The clips of a split: random ones to train on, else the first ones of all episodes, then the second, and so on.

        In that order, neighbors are of different episodes, as comparisons with the actions of another clip want it.
        """
        store, training = self.store, split == "train"
        step = 1 if training else self.clip_length - self.history + 1
        chosen = self.episodes(split)
        starts = [np.arange(store.starts[e], store.ends[e] - self.clip_length + 1, step) for e in chosen]
        short = [store.names[e] for e, found in zip(chosen, starts, strict=True) if not len(found)]
        rounds = np.concatenate([np.arange(len(found)) for found in starts])
        order = np.arange(len(rounds)) if training else np.argsort(rounds, kind="stable")
        places = np.concatenate(starts)[order]
        numbers = np.repeat(np.arange(len(chosen)), [len(found) for found in starts])[order]
        if not len(places):
            longest = max(int(store.ends[e] - store.starts[e]) for e in chosen)
            raise ValueError(
                f"No {split} episode has the {self.clip_length} frames of a clip (history={self.history} + (windows="
                f"{self.windows} - 1) x stride={self.stride}); the longest has {longest}: lower data.windows or data.stride."
            )
        if short and not self._said:
            rank_zero_info(
                f"{len(short)} of {len(chosen)} {split} episodes are shorter than a clip of {self.clip_length} frames and "
                f"are left out, such as {short[0]}."
            )
            self._said = training
        count = max(1, len(places) // max(1, (self.windows - 1) * self.stride)) if training else len(places)
        return Clips(store, places, numbers, self.clip_length, self.shown, count, self.seed if training else None)

    @property
    def shown(self) -> Tensor:
        """Offsets in a clip of the frames that windows show: all, or window by window where they do not overlap."""
        if self.stride < self.history:
            return torch.arange(self.clip_length)
        return (torch.arange(self.windows)[:, None] * self.stride + torch.arange(self.history)).flatten()

    def observe(self, clip: Clip) -> ClipBatch:
        """Turn clips into windows and actions, on the device where they are."""
        numbers = clip.numbers.view(torch.float32)
        parts = {name: numbers[..., self.store.column(name)] for name in COLUMNS if self.store.widths[name]}
        newest = slice(self.history - 1, None, self.stride)
        vectors = None
        if self.observation != "pixels":
            vectors = parts["vectors"].unfold(1, self.history, self.stride).movedim(-1, 2).flatten(2)  # (B, T, history * V)
        if clip.frames is None:
            assert vectors is not None
            windows, vectors = vectors, None
        else:
            frames = clip.frames.float() / 255
            if self.stride < self.history:
                windows = frames.unfold(1, self.history, self.stride).movedim(-1, 2).flatten(2, 3)
            else:
                windows = frames.unflatten(1, (-1, self.history)).flatten(2, 3)  # (B, T, history * C, H, W)
        steps = {
            name: parts[name][:, self.history - 1 : -1].unfold(1, self.stride, self.stride).movedim(-1, 2)
            for name in ("actions", "rewards")
            if name in parts
        }  # (B, T - 1, stride, scalars)
        states = parts["states"][:, newest] if "states" in parts else None
        rewards = steps["rewards"].sum(dim=(2, 3)) if "rewards" in steps else None
        return ClipBatch(windows, states, steps["actions"].flatten(2), vectors, rewards, clip.episodes)

    def on_after_batch_transfer(self, batch: Clip, dataloader_idx: int) -> ClipBatch:
        seen = self.observe(batch)
        if self.trainer is None:
            return seen
        # What the networks see is rounded to their precision; the states and rewards that evaluate them are not.
        return self.trainer.precision_plugin.convert_input(seen)._replace(states=seen.states, rewards=seen.rewards)

    def first_clips(self, count: int, device: torch.device) -> ClipBatch:
        """Training clips, for a device: the first `count` of an epoch."""
        clips = self._clips("train")
        found = clips.__getitems__([(0, index) for index in range(min(count, len(clips)))])
        return self.observe(Clip(*(None if part is None else part.to(device) for part in found)))  # type: ignore[arg-type]

    def make_train_loader(self) -> ResumableLoader:
        clips = self._clips("train")
        return ResumableLoader(clips, self.train_sampler(len(clips)), **self.loader_settings())

    def order(self) -> dict[str, Any]:
        names = json.dumps([self.store.names, self.store.ends.tolist()])
        episodes = hashlib.sha256(names.encode()).hexdigest()[:16]
        kept = {
            "windows": self.windows,
            "history": self.history,
            "stride": self.stride,
            "size": self.size,
            "seed": self.seed,
        }
        return kept | {"episodes": episodes, **{f"{name}_fraction": value for name, value in self.fractions.items()}}

    def val_dataloader(self) -> DataLoader[Any]:
        return self._held_out_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._held_out_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._held_out_loader("test")

    def _held_out_loader(self, split: str) -> DataLoader[Any]:
        rows = HeldOut(self._clips(split))
        sampler = self.held_out_sampler(split, rows)
        return DataLoader(
            rows, batch_size=self.batch_size, sampler=sampler, pin_memory=self.on_gpu, collate_fn=lambda clips: clips
        )
