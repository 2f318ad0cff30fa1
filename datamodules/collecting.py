"""Recordings of an environment, made here: random held actions, or a policy of the user's."""

import importlib
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.random import SeedSequence
from rich.progress import track

from datamodules.environments import Environment, EnvironmentSettings
from datamodules.recordings import Episode, RecordingInfo, write_episode, write_info
from datamodules.recordings.npz_folder import INFO_FILE, read_info

Policy = Callable[[Any, dict[str, Any]], Any]
"""Chooses the environment's own action, from its observation and info."""

MAX_TRIES = 20
"""Seeds that are tried for an episode, if it is over before its first step."""


@dataclass
class Collect:
    """How a recording is made.

    Args:
        environment: Which environment, and how it is looked at.
        episodes: Number of episodes.
        steps: Maximum number of steps of an episode, of `environment.action_repeat` applied actions each. It also ends where
            the environment ends it.
        hold: Number of steps for which a random action is held.
        policy: Import path of a function, "package.module:function", that takes the `gymnasium.Env` and a seed at the
            beginning of each episode and returns what chooses actions: a function of observation and info, None for "the
            end". By default actions are random, uniform between their limits, and held.
        policy_arguments: Further arguments of that function.
        seed: Seed of all episodes: episode n is a function of it and of n, however many processes there are.
        num_workers: Number of processes, this one among them; 0 for one for each core.

    Raises:
        ValueError: A number out of its range.
    """

    environment: EnvironmentSettings
    episodes: int = 500
    steps: int = 100
    hold: int = 1
    policy: str | None = None
    policy_arguments: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    num_workers: int = 0

    def __post_init__(self) -> None:
        for name in ("episodes", "steps", "hold"):
            if getattr(self, name) < 1:
                raise ValueError(f"collect.{name}={getattr(self, name)}: give an integer of at least 1.")
        if self.seed < 0 or self.num_workers < 0:
            raise ValueError(f"collect.seed={self.seed}, num_workers={self.num_workers}: neither may be negative.")


def collect(settings: Collect, root: str | os.PathLike[str]) -> None:
    """Record episodes into a folder of .npz files; those that are there already are kept.

    Args:
        settings: How.
        root: The folder. What was cut goes on where it was, and the result is the same.

    Raises:
        ValueError: The folder holds a recording of other settings, or the environment cannot be made.
    """
    folder = Path(root)
    if (folder / INFO_FILE).exists() or any(folder.glob("*.npz")):
        _check_same(folder, settings)
    there = len(list(folder.glob("*.npz")))
    if there > settings.episodes:
        rank_zero_info(f"{folder} holds {there} episodes, of {settings.episodes} that are asked for: all of them are kept.")
    missing = [number for number in range(settings.episodes) if not (folder / file_of(number)).exists()]
    if not missing:
        return
    if settings.policy is not None:
        imported(settings.policy)  # before anything is written
    if not (folder / INFO_FILE).exists():
        write_info(folder, describe(settings))
    workers = min(settings.num_workers or os.cpu_count() or 1, len(missing))
    rank_zero_info(
        f"Collecting {len(missing)} episodes of {settings.environment.id} into {folder}, in {workers} process(es)."
    )
    record = partial(record_episode, settings, str(folder))
    done = settings.episodes - len(missing)
    try:
        for _ in track(_results(record, missing, workers), "collect", settings.episodes, completed=done):
            pass
    finally:  # windows and OpenGL of this process are not to be inherited by what it forks later
        while _environments:
            _environments.popitem()[1].close()


def _results(record: Callable[[int], int], numbers: list[int], workers: int) -> Iterator[int]:
    """Record episodes, in this process and in `workers` - 1 others, and yield as they are done.

    This process takes them from the end while the others, which take seconds to start, take them from the beginning.
    """
    if workers == 1:
        yield from map(record, numbers)
        return
    # Spawned, not forked: windows, OpenGL and threads of this process are not to be shared.
    with ProcessPoolExecutor(workers - 1, multiprocessing.get_context("spawn")) as pool:
        try:
            waiting = deque((number, pool.submit(record, number)) for number in numbers)
            while waiting:
                number, last = waiting[-1]
                if last.cancel():  # nobody has begun with it
                    waiting.pop()
                    yield record(number)
                else:
                    yield waiting.popleft()[1].result()
                while waiting and waiting[0][1].done():
                    yield waiting.popleft()[1].result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def file_of(number: int) -> str:
    """File of an episode."""
    return f"episode_{number:06d}.npz"


def describe(settings: Collect) -> RecordingInfo:
    """What recording.json says of a recording."""
    environment = Environment(settings.environment)
    environment.reset(settings.seed)
    info = RecordingInfo(
        action_low=None if environment.num_choices else environment.low.tolist(),
        action_high=None if environment.num_choices else environment.high.tolist(),
        num_choices=environment.num_choices,
        state_names=environment.state_names(),
        environment=origin(settings),
    )
    environment.close()
    return info


def origin(settings: Collect) -> dict[str, Any]:
    """What an episode of a recording is a function of, next to its number: what JSON can hold."""
    kept = ("steps", "hold", "policy", "policy_arguments", "seed")
    return settings.environment.as_dict() | {name: getattr(settings, name) for name in kept}


def _check_same(folder: Path, settings: Collect) -> None:
    # A recording that is older than a setting was made with its default.
    before, now = EnvironmentSettings("").as_dict() | read_info(folder).environment, origin(settings)
    changed = [name for name in now if _plain(before.get(name)) != _plain(now[name])]
    if changed:
        name = changed[0]
        raise ValueError(
            f"{folder} holds a recording with {name}={before.get(name)}, and now {name}={now[name]} is asked for: choose "
            "another folder, or remove that one."
        )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))  # tuples and lists are the same


_environments: dict[str, Environment] = {}
"""The environment of this process, by its settings: to make one takes longer than an episode."""


def record_episode(settings: Collect, folder: str, number: int) -> int:
    """Record an episode into its file, and return its number of steps."""
    key = repr(settings.environment)
    if key not in _environments:
        _environments[key] = Environment(settings.environment)
    environment = _environments[key]
    for attempt in range(MAX_TRIES):
        seed = int(SeedSequence((settings.seed, number, attempt)).generate_state(1)[0] >> 1)
        episode = play(environment, settings, seed, file_of(number))
        if len(episode.actions):
            write_episode(Path(folder), episode)
            return len(episode.actions)
    raise ValueError(f"{settings.environment.id}: {MAX_TRIES} episodes were over before their first step.")


def play(environment: Environment, settings: Collect, seed: int, name: str) -> Episode:
    """An episode from its seed."""
    environment.reset(seed)
    policy = make_policy(environment, settings, seed)
    seen = {key: [value] for key, value in _look(environment).items()}
    actions, rewards = [], []
    for _ in range(settings.steps):
        action = policy(environment.observation, environment.info)
        if action is None:  # the policy has nothing left to do
            break
        action = environment.within_limits(action)
        step = environment.act(action)
        actions.append(np.asarray(action).copy())
        rewards.append(step.reward)
        for key, value in _look(environment).items():
            seen[key].append(value)
        if step.terminated or step.truncated:
            break
    arrays: dict[str, Any] = {key: np.stack(values) for key, values in seen.items() if values[0] is not None}
    kind = np.int64 if environment.num_choices else np.float32
    shape = (len(actions),) if environment.num_choices else (len(actions), -1)
    own = np.asarray(actions, kind) - (int(environment.env.action_space.start) if environment.num_choices else 0)
    return Episode(
        name, own.reshape(shape) if len(actions) else own, rewards=np.asarray(rewards, np.float32), seed=seed, **arrays
    )


def _look(environment: Environment) -> dict[str, Any]:
    frame = None if environment.settings.image_size is None else environment.frame()
    return {"frames": frame, "vectors": environment.vector(), "states": environment.state()}


def make_policy(environment: Environment, settings: Collect, seed: int) -> Policy:
    """What chooses the actions of an episode."""
    if settings.policy is None:
        return RandomHeld(environment, settings.hold, seed)
    return imported(settings.policy)(environment.env, seed, **settings.policy_arguments)


def imported(policy: str) -> Callable[..., Policy]:
    """The function of an import path.

    Raises:
        ValueError: There is none.
    """
    module, _, name = policy.rpartition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"collect.policy={policy!r} cannot be imported ({error}): give package.module:function.") from error


class RandomHeld:
    """Actions that are uniform between their limits, and held for some steps; the first of an episode for fewer."""

    def __init__(self, environment: Environment, hold: int, seed: int) -> None:
        self.environment, self.hold = environment, hold
        self.random = np.random.default_rng(seed)
        self.left = 0 if hold == 1 else int(self.random.integers(1, hold + 1))
        self.action = self._draw()

    def _draw(self) -> Any:
        if self.environment.num_choices:
            return int(self.random.integers(self.environment.num_choices)) + int(self.environment.env.action_space.start)
        return self.environment.own_action(self.random.uniform(-1, 1, self.environment.action_dim))

    def __call__(self, observation: Any, info: dict[str, Any]) -> Any:
        if self.left == 0:
            self.action, self.left = self._draw(), self.hold
        self.left -= 1
        return self.action
