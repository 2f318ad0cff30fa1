"""A policy that plans with a world model, for `datamodules.Collect`: recordings of where the model's plans lead.

Shapes: H steps of a plan, K environment steps in a step of the model, A scalars of an action, V scalars of a vector.
"""

from collections import deque
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.environments import Environment, settings_of
from datamodules.episode_store import checked, prepared
from datamodules.recordings import read
from jepa_lightning.latent_dynamics import LatentDynamics
from jepa_lightning.planner import Planner
from jepa_lightning.probes.dynamics.environment_world import window_of
from jepa_lightning.weights.loading import load
from jepa_lightning.weights.runs import data_of


class Known(NamedTuple):
    """A world model, and the recording that it was trained on."""

    jepa: LatentDynamics
    recording: Any
    history: int
    stride: int


@lru_cache(maxsize=1)
def known(checkpoint: str) -> Known:
    """A world model and its recording, read once in a process.

    Raises:
        ValueError: It is no world model of images, or its data is not known.
    """
    with torch.random.fork_rng(devices=[]):  # a network is built on the way, and a later model should not differ by it
        jepa, data = load(checkpoint), data_of(checkpoint)
    if not isinstance(jepa, LatentDynamics) or not jepa.action_dim or jepa.observation != "pixels":
        raise ValueError(f"{checkpoint} holds a {type(jepa).__name__}: a world model of images, with actions, is needed.")
    if data is None or "root" not in data["init_args"]:
        raise ValueError(f"The recording of {checkpoint} is not known: no config.yaml that names data.root lies next to it.")
    arguments = data["init_args"]
    return Known(jepa, read(arguments["root"]), jepa.history, int(arguments.get("stride", 1)))


class PlannedPolicy:
    """Plans to a frame of the recording, drawn at random, carries the plan out, and goes on to the next.

    As the policy of a collection, with `policy: jepa_lightning.planned_policy:PlannedPolicy`: each round of collecting and
    training sees more of what the model can bring about.

    Args:
        env: The environment of gymnasium.
        seed: Seed of an episode.
        checkpoint: Run directory or checkpoint of a world model of images, trained on a recording of the environment.
        horizon: Steps H of a plan.
        noise: Standard deviation of what is added to an action in [-1, 1]; the probability of a random one if discrete. In
            [0, 1].
        samples: Number of samples of a round of the search, an eighth of which are its elites.
        iterations: Number of rounds.

    Raises:
        ValueError: It holds no such model, or one of another environment, or an argument is out of its range.
    """

    def __init__(
        self,
        env: Any,
        seed: int,
        checkpoint: str,
        horizon: int = 5,
        noise: float = 0.1,
        samples: int = 64,
        iterations: int = 4,
    ) -> None:
        for name, value, lowest in (("horizon", horizon, 1), ("samples", samples, 2), ("iterations", iterations, 1)):
            if value < lowest:
                raise ValueError(f"collect.policy_arguments: {name}={value}: give an integer of at least {lowest}.")
        if not 0 <= noise <= 1:
            raise ValueError(f"collect.policy_arguments: noise={noise}: give a number in [0, 1].")
        self.known, self.horizon, self.noise = known(checkpoint), horizon, noise
        self.planner = Planner(num_samples=samples, num_iterations=iterations, num_elites=max(2, samples // 8))
        self.environment = Environment(settings_of(self.known.recording.info), env)
        expected = (self.known.jepa.action_dim, self.known.jepa.num_choices)
        if expected != (self.known.stride * self.environment.action_dim, self.environment.num_choices):
            raise ValueError(
                f"{checkpoint} plans {expected[0]} scalars of {self.known.stride} action(s) with {expected[1]} choices, "
                f"and the environment takes {self.environment.action_dim} with {self.environment.num_choices}: another one."
            )
        self.rng = np.random.default_rng(seed)
        self.frames: deque[NDArray[np.uint8]] = deque(maxlen=self.known.history)
        self.left: list[NDArray[np.float64]] = []

    def __call__(self, observation: Any, info: dict[str, Any]) -> Any:
        """The environment's own next action."""
        self.environment.observation, self.environment.info = observation, info
        self.frames.append(self._prepared(self.environment.frame()[None])[0])
        if not self.left:
            self.left = list(self._plan())
        return self.environment.own_action(self._disturbed(self.left.pop(0)))

    def _prepared(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return prepared(frames, self.known.jepa.image_size, self.known.jepa.channels)

    def _plan(self) -> NDArray[np.float64]:
        """Actions of the next plan, (H * K, A)."""
        history, frames = self.known.history, self._recorded_frames()
        end = int(self.rng.integers(len(frames))) + 1
        goal = window_of(list(self._prepared(frames[max(0, end - history) : end])), history)
        now = window_of(list(self.frames), history)
        seed, threads = int(self.rng.integers(2**31)), torch.get_num_threads()
        torch.set_num_threads(1)  # there is a process for each core
        try:
            plan = self.known.jepa.plan(now, goal, self.horizon, self.planner, seed)[0]
        finally:
            torch.set_num_threads(threads)
        return plan.double().reshape(self.horizon * self.known.stride, -1).numpy()

    def _recorded_frames(self) -> NDArray[np.uint8]:
        """Frames of an episode of the recording, (T, H, W, C), drawn again while a damaged one is drawn."""
        recording = self.known.recording
        for number in self.rng.permutation(len(recording.names)):
            try:
                frames = checked(recording.episode(int(number)), None, True).frames
            except (ValueError, OSError):
                continue
            assert frames is not None
            return frames
        raise ValueError(f"No episode of the recording of {self.known.jepa.trained_on.get('id', 'the model')} has frames.")

    def _disturbed(self, action: NDArray[np.float64]) -> NDArray[np.float64]:
        if not self.environment.num_choices:
            return action + self.noise * self.rng.standard_normal(len(action))
        if self.rng.random() < self.noise:
            return np.eye(len(action))[self.rng.integers(len(action))]
        return action
