"""Episodes in environments of gymnasium, seen as `Trajectories` shows them.

Shapes: E episodes, T windows, F frames, K environment steps in a step of the model, A scalars of an action, L scalars of a
state.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.environments import Environment
from datamodules.episode_store import prepared, scaled
from datamodules.recordings import Episode
from datamodules.trajectories import Trajectories
from jepa_lightning.planner import Cost

SAME_IMAGE = 2.0
"""Mean difference of gray levels (0 to 255) above which a replayed frame is not the recorded one."""


SAME_STATE = 1e-3
"""Absolute and relative difference of states above which a replayed one is not the recorded one."""


class EnvironmentWorld:
    """Environments that act side by side, each with an episode of its own.

    Args:
        data: What observations and actions are like.
        environments: As many as there are episodes, E.
        filmed: Of how many episodes all frames are kept.
    """

    def __init__(self, data: Trajectories, environments: list[Environment], filmed: int = 0) -> None:
        self.data, self.environments, self.filmed = data, environments, filmed
        self.num_episodes, self.action_dim, self.num_choices = len(environments), data.action_dim, data.num_choices
        self.held = max(1, int(data.store.info.environment.get("hold", 1)) // data.stride)
        self.frames: list[list[NDArray[np.uint8]]] = [[] for _ in environments]
        self.seen_vectors: list[list[NDArray[np.float32]]] = [[] for _ in environments]
        self.states: list[list[NDArray[np.float32]]] = [[] for _ in environments]
        """All states so far, after each environment step, (L,) each."""
        self.ended = np.zeros(len(environments), bool)
        """Whether the environment itself has ended the episode."""
        self.rewards = np.zeros(len(environments))
        """Return so far."""
        self.acted = [0] * len(environments)

    def begin(self, number: int, seed: int, actions: NDArray[Any]) -> None:
        """Put an environment at the start of its episode: reset, then the actions of a recording, (T,) or (T, A)."""
        environment = self.environments[number]
        environment.reset(seed)
        self._look(number, len(actions) < self.data.history)
        for step, action in enumerate(actions):
            environment.act(_native(environment, action))
            self._look(number, step >= len(actions) - self.data.history)
        self.states[number] = self.states[number][-1:]
        self.ended[number], self.rewards[number] = False, 0.0
        if number < self.filmed:
            self.frames[number] = self.frames[number][-self.data.history :]

    def _look(self, number: int, drawn: bool) -> None:
        environment = self.environments[number]
        state, vector = environment.state(), environment.vector()
        if state is not None:
            self.states[number].append(state)
        if vector is not None and self.data.observation != "pixels":
            self.seen_vectors[number].append(vector)
        if self.data.observation != "vectors" and (drawn or number < self.filmed):
            self.frames[number].append(prepared(environment.frame()[None], self.data.image_size, self.data.channels)[0])

    def window(self) -> Tensor:
        """What is seen now, (E, 1, ...): pixels in [0, 1], or vectors."""
        if self.data.observation == "vectors":
            found = self.vectors()
            assert found is not None
            return found
        return torch.stack([window_of(frames[-self.data.history :], self.data.history) for frames in self.frames])

    def vectors(self) -> Tensor | None:
        """Vectors, (E, 1, history * V); None for a model of pixels alone."""
        if self.data.observation == "pixels":
            return None
        rows = [_filled(vectors[-self.data.history :], self.data.history) for vectors in self.seen_vectors]
        return torch.from_numpy(np.stack([np.concatenate(row) for row in rows]))[:, None]

    def act(self, actions: Tensor) -> None:
        """Apply actions (E, A) until the next window ends; an episode that has ended stays where it is."""
        every = actions.double().cpu().numpy().reshape(self.num_episodes, self.data.stride, -1)  # (E, K, A / K)
        for number, (environment, chosen) in enumerate(zip(self.environments, every, strict=True)):
            for k, action in enumerate(chosen):
                if self.ended[number]:
                    break
                step = environment.act(environment.own_action(action))
                self.acted[number] += 1
                self.rewards[number] += step.reward
                self.ended[number] |= step.terminated
                self._look(number, k >= self.data.stride - self.data.history or self.ended[number])


def _native(environment: Environment, action: Any) -> Any:
    """A recorded action as the environment takes it."""
    if environment.num_choices:
        return int(action) + int(environment.env.action_space.start)
    return np.asarray(action, environment.env.action_space.dtype).reshape(environment.env.action_space.shape)


def _filled(parts: list[Any], history: int) -> list[Any]:
    """The oldest repeated where an episode has only begun."""
    return [parts[0]] * (history - len(parts)) + parts


def window_of(frames: list[NDArray[np.uint8]], history: int) -> Tensor:
    """A window (1, history * C, H, W) in [0, 1] of up to `history` frames (C, H, W)."""
    return torch.from_numpy(np.concatenate(_filled(frames, history)))[None].float() / 255


def check_replay(world: EnvironmentWorld, number: int, episode: Episode, frame: int) -> None:
    """Compare what an environment shows, and its state, with what was recorded.

    Raises:
        ValueError: It is something else: the environment does not repeat its recordings.
    """
    cause = "It is not deterministic, or not the recorded one."
    place = f"{episode.name}: after its seed and its first {frame} actions the environment"
    if episode.states is not None and world.states[number]:
        state, recorded_state = world.states[number][-1], episode.states[frame]
        if not np.allclose(state, recorded_state, rtol=SAME_STATE, atol=SAME_STATE):
            raise ValueError(f"{place} is in the state {state}, and {recorded_state} was recorded. {cause}")
    if episode.frames is None or not world.frames[number]:
        return
    recorded = prepared(episode.frames[frame : frame + 1], world.data.image_size, world.data.channels)[0]
    away = float(np.abs(recorded.astype(float) - world.frames[number][-1]).mean())
    if away > SAME_IMAGE:
        raise ValueError(
            f"{place} does not show what was recorded (mean difference of {away:.1f} gray levels of 255). {cause}"
        )


class SimulatorOracle:
    """Cost by trying out: the true environments, put back afterwards. The distance is that of named states.

    Args:
        distance: From states (E, L) to their goals, (E,).
    """

    def __init__(self, distance: Callable[[NDArray[np.float32]], NDArray[np.float64]]) -> None:
        self.distance = distance

    def __call__(self, world: EnvironmentWorld) -> Cost:
        snapshots = [environment.snapshot() for environment in world.environments]

        def cost(actions: Tensor) -> Tensor:
            episodes, samples, steps, _ = actions.shape
            every = actions.double().numpy().reshape(episodes, samples, steps * world.data.stride, -1)
            ends = [
                np.stack([environment.try_out(snapshot, sequence) for sequence in sequences])
                for environment, snapshot, sequences in zip(world.environments, snapshots, every, strict=True)
            ]  # (N, L) for each episode
            away = [self.distance(np.stack(states)) for states in zip(*ends, strict=True)]  # N times (E,)
            return torch.from_numpy(np.stack(away, axis=1)).float()

        return cost


def actions_of(episode: Episode, first: int, steps: int, data: Trajectories) -> Tensor:
    """The recorded actions of some steps of the model, from a frame: (steps, A)."""
    rows = scaled(episode.actions[first : first + steps * data.stride], data.store.info)
    return torch.from_numpy(rows.reshape(steps, -1))
