"""Held-out episodes as somebody else's evaluation takes starts and goals from them.

Shapes: T frames, C channels, H W pixels, L scalars of a state.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from datamodules.trajectories import Trajectories


class RecordedStarts:
    """Held-out episodes of ours as the data set that `World.evaluate` takes starts and goals from.

    Args:
        data: Recorded episodes with frames and a state, as the environment has it.
        split: "val" or "test".
    """

    column_names = ("pixels", "state")

    def __init__(self, data: Trajectories, split: str = "test") -> None:
        self.store, self.numbers = data.store, data.episodes(split)
        self.lengths = [int(self.store.ends[n] - self.store.starts[n]) for n in self.numbers]

    def load_chunk(self, episodes: Any, starts: Any, ends: Any) -> list[dict[str, Any]]:
        """Frames (T, C, H, W) and states (T, L) of some stretches."""
        found = []
        assert self.store.frames is not None
        for episode, start, end in zip(episodes, starts, ends, strict=True):
            first = int(self.store.starts[self.numbers[episode]])
            rows = slice(first + int(start), first + int(end))
            states = self.store.table[rows, self.store.column("states")].numpy()
            found.append({"pixels": self.store.frames[rows], "state": states})
        return found

    def tasks(
        self, count: int, offset: int, far: float, seed: int, of: Sequence[int] = (0, 1)
    ) -> tuple[list[int], list[int]]:
        """Episodes and starting frames, drawn from all from which a goal lies `offset` steps ahead.

        Args:
            count: Number of tasks.
            offset: Steps from a start to its goal.
            far: Distance of states that start and goal exceed; 0 for all tasks.
            seed: Seed of the draw.
            of: Numbers of the scalars of the state whose distance that is.

        Raises:
            ValueError: There are too few.
        """
        possible = [(e, s) for e, length in enumerate(self.lengths) for s in range(length - offset)]
        order = np.random.default_rng(seed).permutation(len(possible))
        chosen: list[tuple[int, int]] = []
        for episode, start in (possible[k] for k in order):
            if len(chosen) == count:
                break
            (found,) = self.load_chunk([episode], [start], [start + offset + 1])
            if far and math.dist(found["state"][0, list(of)], found["state"][-1, list(of)]) <= far:
                continue
            chosen.append((episode, start))
        if len(chosen) < count:
            raise ValueError(f"Only {len(chosen)} of {count} starts have a goal {offset} steps ahead: record more episodes.")
        return [episode for episode, _ in chosen], [start for _, start in chosen]
