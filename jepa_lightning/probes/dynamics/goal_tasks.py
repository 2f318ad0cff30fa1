"""Starts and goals from held-out episodes of a recording.

Shapes: E episodes, A scalars of an action, V scalars of a vector.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.episode_store import checked, prepared
from datamodules.recordings import Episode, read
from datamodules.trajectories import Trajectories
from jepa_lightning.probes.dynamics.environment_world import window_of
from jepa_lightning.probes.dynamics.episodes import Controller, World, Zero


class Goal(NamedTuple):
    """Where an episode starts and where it should lead, both taken from a held-out episode."""

    episode: Episode
    start: int
    """Frame that it starts from."""
    end: int
    """Frame of the goal."""


def draw_goals(data: Trajectories, offset: int, count: int, trivial: Callable[[Goal], bool]) -> list[Goal]:
    """Starts and goals from test episodes, in an order that is a function of the data's seed.

    Args:
        data: Recorded episodes.
        offset: Frames from the start to the goal.
        count: Number of goals.
        trivial: Whether a start is at its goal already, and is left out.

    Raises:
        ValueError: There are too few, or an episode's environment cannot be put at its start.
    """
    recording = read(data.root)
    place = {name: number for number, name in enumerate(recording.names)}
    read_again = [recording.episode(place[data.store.names[number]]) for number in data.episodes("test")]
    episodes = [checked(episode, None, data.observation != "vectors") for episode in read_again]  # as they were learned from
    starts = [range(data.history - 1, len(episode.actions) - offset + 1) for episode in episodes]
    possible = [(episode, start) for episode, found in zip(episodes, starts, strict=True) for start in found]
    goals: list[Goal] = []
    for k in np.random.default_rng(data.seed).permutation(len(possible)):
        goal = Goal(possible[k][0], possible[k][1], possible[k][1] + offset)
        if trivial(goal):
            continue
        if goal.episode.seed is None:
            raise ValueError(f"{goal.episode.name} has no seed: its environment cannot be put at a start of it.")
        goals.append(goal)
        if len(goals) == count:
            return goals
    raise ValueError(
        f"Only {len(goals)} of {count} starts in {len(episodes)} test episodes have a goal {offset} frames ahead that they "
        "are not at: record more episodes, or lower model.offset or model.num_episodes."
    )


def goal_windows(data: Trajectories, goals: list[Goal]) -> tuple[Tensor, Tensor | None]:
    """Windows (E, 1, ...) of goals, and their vectors (E, 1, history * V) where both are observed."""
    history, store = data.history, data.store
    numbers = {name: number for number, name in enumerate(store.names)}
    ends = [int(store.starts[numbers[goal.episode.name]]) + goal.end for goal in goals]
    vectors = None
    if data.observation != "pixels":
        rows = [store.table[end - history + 1 : end + 1, store.column("vectors")].flatten() for end in ends]
        vectors = torch.stack(rows)[:, None]
    if store.frames is None:
        assert vectors is not None
        return vectors, None
    return torch.stack(
        [window_of(list(store.frames[end - history + 1 : end + 1].numpy()), history) for end in ends]
    ), vectors


def image_window(data: Trajectories, path: str) -> Tensor:
    """The window (1, 1, ...) of an image in a file, at rest: the same frame throughout its history.

    Raises:
        ValueError: It cannot be read, or the model sees other things than images.
    """
    if data.observation != "pixels":
        raise ValueError(f"model.goal_image={path}: the model observes {data.observation}, and an image has no vectors.")
    try:
        image = np.asarray(Image.open(path).convert("RGB"))
    except OSError as error:
        raise ValueError(f"model.goal_image={path} cannot be read: {error}") from error
    return window_of(list(prepared(image[None], data.image_size, data.channels)), data.history)[None]


class Replay:
    """The recorded actions, then nothing.

    Args:
        actions: Those of each episode, (steps, A).
    """

    def __init__(self, actions: list[Tensor]) -> None:
        self.actions = torch.stack(actions, dim=1)

    def __call__(self, world: World, step: int) -> Tensor:
        return self.actions[step] if step < len(self.actions) else Zero()(world, step)


class Once:
    """Another controller for some steps, then nothing.

    Args:
        controller: The other one.
        steps: Number of steps.
    """

    def __init__(self, controller: Controller, steps: int) -> None:
        self.controller, self.steps = controller, steps

    def __call__(self, world: World, step: int) -> Tensor:
        return self.controller(world, step) if step < self.steps else Zero()(world, step)


class Timed:
    """A controller whose time is taken."""

    def __init__(self, controller: Controller) -> None:
        self.controller, self.seconds = controller, 0.0

    def __call__(self, world: World, step: int) -> Tensor:
        began = time.monotonic()
        actions = self.controller(world, step).cpu()  # which waits for a GPU
        self.seconds += time.monotonic() - began
        return actions
