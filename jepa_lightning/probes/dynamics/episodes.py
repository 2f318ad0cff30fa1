"""Episodes of an actuated pendulum: true physics, seen as the data module shows it, under a controller.

Shapes: E episodes, F frames, N sampled sequences, H steps, A scalars of an action, D embedding dimension.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from datamodules.torques import WARM_UP_FRAMES, after_warm_up, random_actions
from jepa_lightning.pendulum import PendulumJEPA
from jepa_lightning.planner import Cost, Planner, latent_cost

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


class World:
    """Pendulums that do what physics says.

    Args:
        data: `DoublePendulum` data module with actions (actuated).
        starts: States of the frames seen at the beginning, (E, history, 4), float64.
    """

    def __init__(self, data: Any, starts: Tensor) -> None:
        self.data = data
        self.frames = starts
        self.limits = starts.new_tensor(data.torque_limits)

    @property
    def states(self) -> Tensor:
        """The newest states: (E, 4)."""
        return self.frames[:, -1]

    def window(self) -> Tensor:
        """What is seen now: (E, 1, ...)."""
        return windows_of(self.data, self.frames[:, -self.data.history :])

    def act(self, actions: Tensor) -> None:
        """Hold actions (E, A) until the next window ends."""
        torques = (actions.to(self.limits) * self.limits)[:, None].expand(-1, self.data.stride, -1)
        path = self.data.pendulum.simulate(self.states, 1 + self.data.stride, torques)
        self.frames = torch.cat([self.frames, path[:, 1:]], dim=1)


def windows_of(data: Any, frames: Tensor) -> Tensor:
    """One window of each (E, history, 4) states: (E, 1, ...) observations."""
    return data.observe(frames.float()).observations


class Controller(Protocol):
    """Chooses the actions."""

    def __call__(self, world: World, step: int) -> Tensor:
        """Actions (E, A) of step `step`, counted from 0."""


class Zero:
    """Does nothing."""

    def __call__(self, world: World, step: int) -> Tensor:
        return world.states.new_zeros(len(world.states), world.data.action_dim)


class Random:
    """Draws actions, and holds them, as the training data does."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.action = torch.empty(0)

    def __call__(self, world: World, step: int) -> Tensor:
        if step % (world.data.action_repeat // world.data.stride) == 0:
            self.action = random_actions(len(world.states), 1, 1, self.generator)[:, 0]
        return self.action


class Planning:
    """Receding-horizon control (MPC): plans, and follows the plan for some steps before it plans anew.

    Args:
        planner: Planner that searches for action sequences.
        look: Function from the current world to the cost of action sequences that start there.
        horizon: Number of steps H of a plan.
        generator: Random generator of the samples.
        deadline: Number of steps of the episode if the goal is to be met at its end; plans then do not reach beyond it.
        every: Number of steps between two plans.
    """

    def __init__(
        self,
        planner: Planner,
        look: Callable[[World], Cost],
        horizon: int,
        generator: torch.Generator,
        deadline: int | None = None,
        every: int = 1,
    ) -> None:
        self.planner, self.look, self.horizon = planner, look, horizon
        self.generator, self.deadline, self.every = generator, deadline, every
        self.plan = torch.empty(0)
        self.predicted: list[Tensor] = []
        """Embeddings that a world model predicted under the actions that were taken, (E, `every`, D) a plan."""

    def __call__(self, world: World, step: int) -> Tensor:
        if step % self.every == 0:
            horizon = self.horizon if self.deadline is None else min(self.horizon, self.deadline - step)
            guess = torch.zeros(len(world.states), horizon, world.data.action_dim, device=self.generator.device)
            if step:
                left = self.plan[:, self.every :][:, :horizon]
                guess[:, : left.shape[1]] = left
            self.plan = self.planner.plan(self.look(world), guess, self.generator, further=step > 0)
            if isinstance(self.look, Imagination):
                self.predicted.append(self.look.predict(self.plan[:, : self.every]))
        return self.plan[:, step % self.every]


class Imagination:
    """Cost by a world model: the distance of predicted embeddings from that of the goal.

    Args:
        jepa: World model, an action-conditioned JEPA.
        goals: Windows of the goals, (E, 1, ...).
        planner: Planner whose kind of cost is used.
    """

    def __init__(self, jepa: PendulumJEPA, goals: Tensor, planner: Planner) -> None:
        self.jepa, self.kind = jepa, planner.cost
        self.goal = jepa.encode(goals)[:, 0]  # (E, D)

    def __call__(self, world: World) -> Cost:
        self.start = self.jepa.encode(world.window().to(self.goal))[:, 0]
        return latent_cost(self.jepa.predictor, self.start, self.goal, self.kind)

    @torch.no_grad()
    def predict(self, actions: Tensor) -> Tensor:
        """Embeddings (E, H, D) rolled out under actions (E, H, A) from the state of the last call."""
        return self.jepa.forecast(self.start, actions.shape[1], actions)


class Oracle:
    """The oracle, a planner that knows the physics, and the state up to some noise: the cost is the distance of the bobs.

    Args:
        goals: States of the goals, (E, 4).
        noise: Standard deviations of the noise on angles (rad) and angular velocities (rad/s); zeros for the true state.
        generator: Random generator of the noise.
    """

    def __init__(self, goals: Tensor, noise: tuple[float, float], generator: torch.Generator) -> None:
        self.goals, self.noise, self.generator = goals, noise, generator

    def __call__(self, world: World) -> Cost:
        error = torch.randn(world.states.shape, generator=self.generator, dtype=world.states.dtype)
        believed = world.states + error * error.new_tensor([*self.noise[:1] * 2, *self.noise[1:] * 2])
        return true_cost(world, believed.float(), self.goals.float())


def true_cost(world: World, states: Tensor, goals: Tensor) -> Cost:
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


def run(data: Any, task: Task, controller: Controller, num_steps: int) -> World:
    """Let a controller act for some steps from the starts of a task, and return the world with all its frames."""
    world = World(data, task.starts)
    for step in range(num_steps):
        world.act(controller(world, step))
    return world


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
