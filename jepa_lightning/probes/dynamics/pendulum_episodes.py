"""Episodes of an actuated pendulum: true physics, seen as the data module shows it.

Shapes: E episodes, F frames, N sampled sequences, H steps, A scalars of an action, D embedding dimension.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from datamodules.torques import WARM_UP_FRAMES, after_warm_up, random_actions
from jepa_lightning.planner import Cost

ORACLE_SUBSTEPS = 2
"""Runge-Kutta steps per frame of the oracle, a planner that knows the physics; the world itself takes more."""


MAX_DRAWS = 20
"""How often as many motions as there are episodes are drawn in search of goals that are not where they start."""


class Task(NamedTuple):
    """Where episodes begin and where they should lead."""

    starts: Tensor
    """(E, history, 4) states of the frames that are seen at the beginning."""

    goals: Tensor
    """(E, history, 4) states of the goal window."""


class PendulumWorld:
    """Pendulums that do what physics says.

    Args:
        data: `DoublePendulum` data module with actions (actuated).
        starts: States of the frames seen at the beginning, (E, history, 4), float64.
    """

    def __init__(self, data: Any, starts: Tensor) -> None:
        self.data = data
        self.frames = starts
        self.limits = starts.new_tensor(data.torque_limits)
        self.num_episodes, self.action_dim, self.num_choices = len(starts), data.action_dim, 0
        self.held = data.action_repeat // data.stride

    @property
    def states(self) -> Tensor:
        """The newest states: (E, 4)."""
        return self.frames[:, -1]

    def window(self) -> Tensor:
        """What is seen now: (E, 1, ...)."""
        return windows_of(self.data, self.frames[:, -self.data.history :])

    def vectors(self) -> None:
        """Nothing: coordinates are observed in the place of pixels."""

    def act(self, actions: Tensor) -> None:
        """Hold actions (E, A) until the next window ends."""
        torques = (actions.to(self.limits) * self.limits)[:, None].expand(-1, self.data.stride, -1)
        path = self.data.pendulum.simulate(self.states, 1 + self.data.stride, torques)
        self.frames = torch.cat([self.frames, path[:, 1:]], dim=1)


def windows_of(data: Any, frames: Tensor) -> Tensor:
    """One window of each (E, history, 4) states: (E, 1, ...) observations."""
    return data.observe(frames.float()).observations


class Oracle:
    """The oracle, a planner that knows the physics, and the state up to some noise: the cost is the distance of the bobs.

    Args:
        goals: States of the goals, (E, 4).
        noise: Standard deviations of the noise on angles (rad) and angular velocities (rad/s); zeros for the true state.
        generator: Random generator of the noise.
    """

    def __init__(self, goals: Tensor, noise: tuple[float, float], generator: torch.Generator) -> None:
        self.goals, self.noise, self.generator = goals, noise, generator

    def __call__(self, world: PendulumWorld) -> Cost:
        error = torch.randn(world.states.shape, generator=self.generator, dtype=world.states.dtype)
        believed = world.states + error * error.new_tensor([*self.noise[:1] * 2, *self.noise[1:] * 2])
        return true_cost(world, believed.float(), self.goals.float())


def true_cost(world: PendulumWorld, states: Tensor, goals: Tensor) -> Cost:
    """Squared distance of both bobs from their places in the goal, simulated by the oracle: states (E, 4) twice."""
    data = world.data
    places = data.pendulum.positions(goals)[:, None]  # (E, 1, 4)

    def cost(actions: Tensor) -> Tensor:
        episodes, samples, steps, _ = actions.shape
        torques = (actions * world.limits.to(actions)).flatten(0, 1).repeat_interleave(data.stride, dim=1)
        starts = states[:, None].expand(-1, samples, -1).flatten(0, 1)
        ends = [
            data.pendulum.simulate(start, 1 + steps * data.stride, torque, substeps=ORACLE_SUBSTEPS)[:, -1]
            for start, torque in zip(starts.split(2**14), torques.split(2**14), strict=True)
        ]
        reached = data.pendulum.positions(torch.cat(ends).unflatten(0, (episodes, samples)))
        return (reached - places).square().sum(dim=-1)

    return cost


def distances(data: Any, states: Tensor, goals: Tensor) -> Tensor:
    """How far each bob is from its place in the goal, in meters: (..., 4) twice -> (..., 2)."""
    difference = data.pendulum.positions(states) - data.pendulum.positions(goals)
    return difference.unflatten(-1, (2, 2)).norm(dim=-1)


def reaching_task(data: Any, num_episodes: int, num_steps: int, radius: float, generator: torch.Generator) -> Task:
    """Goals that other torques reached: a hanging pendulum moved under random torques, and then moves on under others.

    The goal is where it is after `num_steps` actions. Episodes that start at their goal, both bobs within `radius` of it,
    are resampled.

    Args:
        data: `DoublePendulum` data module with actions (actuated).
        num_episodes: Number of episodes E.
        num_steps: Number of actions between start and goal.
        radius: Radius around the goal in meters.
        generator: Random generator on the CPU.

    Raises:
        ValueError: Random torques lead nowhere.
    """
    history, length = data.history, data.history + num_steps * data.stride
    found: list[Tensor] = []
    for _ in range(MAX_DRAWS):
        frames = torch.full((num_episodes,), WARM_UP_FRAMES)
        begin = after_warm_up(data.pendulum, data.torque_limits, frames, data.action_repeat, generator)
        actions = random_actions(num_episodes, length - 1, data.action_repeat, generator, first=history - 1)
        path = data.pendulum.simulate(begin, length, actions * actions.new_tensor(data.torque_limits))
        away = (distances(data, path[:, history - 1], path[:, -1]) > radius).any(dim=-1)
        found.append(path[away])
        if sum(len(part) for part in found) >= num_episodes:
            paths = torch.cat(found)[:num_episodes]
            return Task(paths[:, :history], paths[:, -history:])
    raise ValueError(
        f"Of {MAX_DRAWS * num_episodes} random motions hardly any leads more than {radius} m away: with data.lengths="
        f"{data.pendulum.lengths} and data.torque_limits={data.torque_limits} there is nothing to reach."
    )


def standing_task(data: Any, num_episodes: int, tip: tuple[float, float], generator: torch.Generator) -> Task:
    """From hanging nearly at rest to a still image of the pendulum with its tip at a place.

    Args:
        data: `DoublePendulum` data module with actions (actuated).
        num_episodes: Number of episodes E. They differ by a hundredth of a radian and of a radian per second.
        tip: Place of the tip, x and y in meters.
        generator: Random generator on the CPU.
    """
    nudge = 0.01 * torch.randn(num_episodes, 4, generator=generator, dtype=torch.float64)
    starts = data.pendulum.simulate(nudge, data.history)
    goal = data.pendulum.reach(tip).expand(num_episodes, data.history, 4)
    return Task(starts, goal)
