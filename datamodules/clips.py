"""Clips cut from recorded episodes.

Shapes: B batch, F frames of a clip, C channels, H W pixels, K numbers next to a frame.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.episode_store import Store
from datamodules.rng import seeded_generator

CLIP_STREAM = 3
"""The seed's use: where a clip starts."""


class Clip(NamedTuple):
    """Clips as they are read: a batch of B."""

    frames: Tensor | None
    """(B, F, C, H, W) uint8; of windows that do not overlap, only the frames that they show."""

    numbers: Tensor
    """(B, F, K) int32, the bits of float32, which no precision plugin rounds on the way to the device."""

    episodes: Tensor
    """(B,) int64: number of the episode in its split."""


class Clips(Dataset[Clip]):
    """Clips of episodes, none across an end. Where a clip starts is a function of (seed, epoch, index).

    An epoch has as many clips as there are frames for, and each start is as likely as any other: the list of all starts is
    divided into equal shares, and a clip starts anywhere in its own.

    Args:
        store: The episodes.
        starts: Frames at which a clip can start, (N,).
        episodes: Number of the episode of each of them in its split, (N,).
        length: Frames of a clip F.
        shown: Offsets of the frames that windows show.
        count: Clips of an epoch.
        seed: Seed of the random starts; None for clips that start exactly at `starts`.
    """

    def __init__(
        self,
        store: Store,
        starts: NDArray[np.int64],
        episodes: NDArray[np.int64],
        length: int,
        shown: Tensor,
        count: int,
        seed: int | None,
    ) -> None:
        self.store, self.length, self.shown, self.count, self.seed = store, length, shown, count, seed
        self.starts, self.episodes = torch.from_numpy(starts), torch.from_numpy(episodes)
        self._chosen: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: tuple[int, int]) -> Clip:
        return self.__getitems__([item])

    def __getitems__(self, items: list[tuple[int, int]]) -> Clip:
        """The clips named by (epoch, index)."""
        epoch = items[0][0]
        if self.seed is None:
            chosen = torch.arange(len(self.starts))
        else:
            if self._chosen[0] != epoch:
                generator = seeded_generator(self.seed, CLIP_STREAM, epoch)
                places = torch.arange(self.count) + torch.rand(self.count, generator=generator, dtype=torch.float64)
                self._chosen = (epoch, (places * len(self.starts) / self.count).long())
            chosen = self._chosen[1]
        which = chosen[torch.tensor([index for _, index in items])]
        starts, episodes = self.starts[which], self.episodes[which]
        rows = starts[:, None] + torch.arange(self.length)
        numbers = self.store.table[rows].view(torch.int32)
        if self.store.frames is None:
            return Clip(None, numbers, episodes)
        shown = starts[:, None] + self.shown
        return Clip(self.store.frames.index_select(0, shown.flatten()).unflatten(0, shown.shape), numbers, episodes)


class HeldOut(Dataset[Any]):
    """Clips by their index alone."""

    def __init__(self, clips: Clips) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitems__(self, indices: list[int]) -> Clip:
        return self.clips.__getitems__([(0, index) for index in indices])
