"""Batches of recorded episodes, next to those of tensors in memory; recording, next to a bare loop of the environment.

    python benchmarks/trajectories.py

Both sides of a ratio take turns in one process (the loop and the collector of a recording, in processes of their own); the
median of the ratios is given. The environment is the double pendulum, which needs no extra but gymnasium.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from datamodules import Trajectories
from datamodules.collecting import Collect, RandomHeld, collect, record_episode
from datamodules.environments import Environment, EnvironmentSettings, resized
from datamodules.recordings import Episode, write_episode

BATCHES, TURNS, BATCH_SIZE, WINDOWS, STRIDE = 60, 7, 64, 7, 5
EPISODES, STEPS = 12, 100
LONGER = 50
"""How many times as many episodes are recorded on two cores: 600, for processes take time to start."""
NAME = "datamodules.pendulum_environment:DoublePendulum-v0"


def recording(root: Path, episodes: int = 200, frames: int = 120) -> None:
    """Episodes of noise, of the size of TwoRoom's."""
    random = np.random.default_rng(0)
    for number in range(episodes):
        images = random.integers(0, 256, (frames, 64, 64, 3), np.uint8)
        write_episode(root, Episode(f"{number:04d}.npz", random.uniform(-1, 1, (frames - 1, 2)), images))


def ours(data: Trajectories) -> Iterator[object]:
    """Batches as a training takes them."""
    loader = data.make_train_loader()
    for epoch in range(BATCHES):
        loader.sampler.set_epoch(epoch)
        for clip in loader:
            yield data.observe(clip)


def plain(frames: torch.Tensor, actions: torch.Tensor) -> Iterator[object]:
    """Batches of the same shapes from tensors of equal clips, shuffled."""
    offsets = STRIDE * torch.arange(WINDOWS)
    while True:
        for index in torch.randperm(len(frames)).split(BATCH_SIZE):
            if len(index) == BATCH_SIZE:
                chosen = frames[index[:, None], offsets]
                acted = actions[index][:, : offsets[-1]].unflatten(1, (-1, STRIDE)).flatten(2)
                yield chosen.float() / 255, acted


def seconds(batches: Iterator[object]) -> float:
    """Seconds of some batches."""
    began = time.perf_counter()
    for _ in range(BATCHES):
        next(batches)
    return time.perf_counter() - began


def loading() -> list[float]:
    """Batches a second of ours over those of tensors, by turn."""
    with tempfile.TemporaryDirectory() as folder:
        recording(Path(folder))
        data = Trajectories(folder, windows=WINDOWS, stride=STRIDE, batch_size=BATCH_SIZE)
        store = data.store
        assert store.frames is not None
        frames = store.frames.unflatten(0, (-1, 120))[:160, : (WINDOWS - 1) * STRIDE + 1].clone()
        actions = store.table[:, store.column("actions")].unflatten(0, (-1, 120))[:160]
        ratios = []
        for _ in range(TURNS):
            mine, theirs = seconds(ours(data)), seconds(plain(frames, actions))
            ratios.append(theirs / mine)
        return ratios


def bare(settings: Collect) -> None:
    """The environment stepped and rendered, and the frames kept: nothing else."""
    environment = Environment(settings.environment)
    for number in range(settings.episodes):
        environment.env.reset(seed=number)
        policy = RandomHeld(environment, 1, number)
        frames = [resized(environment.env.render(), 64)]
        for _ in range(settings.steps):
            environment.env.step(policy(None, {}))
            frames.append(resized(environment.env.render(), 64))
        np.stack(frames)


def timed(work: Callable[[], object]) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_this_process(settings: Collect, folder: str) -> None:
    """Record as a process of `collect` does."""
    for number in range(settings.episodes):
        record_episode(settings, folder, number)


def collecting() -> dict[str, list[float]]:
    """Frames a second of the collector over those of the bare loop, on one core and on two."""
    one = Collect(EnvironmentSettings(NAME), EPISODES, STEPS, num_workers=1)
    many = Collect(EnvironmentSettings(NAME), LONGER * EPISODES, STEPS, num_workers=2)
    ratios: dict[str, list[float]] = {"one core": [], "two cores, start of the processes included": []}
    for _ in range(2):
        alone = timed(lambda: bare(one))
        with tempfile.TemporaryDirectory() as folder:
            ratios["one core"].append(alone / timed(lambda: in_this_process(one, folder)))
        with tempfile.TemporaryDirectory() as folder:
            both = timed(lambda: collect(many, folder))
        ratios["two cores, start of the processes included"].append(LONGER * alone / both)
    return ratios


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {}
    for measure in (lambda: {"batches over those of tensors": loading()}, collecting):
        for name, ratios in measure().items():
            found[name] = statistics.median(ratios)
            print(f"{name}: median {found[name]:.2f} of {', '.join(f'{ratio:.2f}' for ratio in ratios)}", flush=True)
    print(json.dumps(found))
