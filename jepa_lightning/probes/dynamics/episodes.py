"""Episodes in any world, under a controller.

Shapes: E episodes, H steps, A scalars of an action, D embedding dimension.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from jepa_lightning.latent_dynamics import LatentDynamics
from jepa_lightning.planner import Cost, Planner, latent_cost


class World(Protocol):
    """E episodes side by side, seen as a data module shows them."""

    num_episodes: int
    action_dim: int
    """Number of scalars A of an action."""
    num_choices: int
    """Number of choices of a discrete action; 0 for continuous ones."""
    held: int
    """Number of steps for which random actions are held in the training data."""

    def window(self) -> Tensor:
        """What is seen now: (E, 1, ...)."""

    def vectors(self) -> Tensor | None:
        """Vectors next to pixels, (E, 1, ...), for models that observe both."""

    def act(self, actions: Tensor) -> None:
        """Apply actions (E, A) until the next window ends."""


WorldType = TypeVar("WorldType", bound=World)


class Controller(Protocol):
    """Chooses the actions."""

    def __call__(self, world: World, step: int) -> Tensor:
        """Actions (E, A) of step `step`, counted from 0."""


class Zero:
    """Does nothing; of discrete actions, always chooses the first."""

    def __call__(self, world: World, step: int) -> Tensor:
        zeros = torch.zeros(world.num_episodes, world.action_dim)
        if world.num_choices:
            zeros[:, :: world.num_choices] = 1
        return zeros


class Random:
    """Draws actions, and holds them, as the training data does."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.action = torch.empty(0)

    def __call__(self, world: World, step: int) -> Tensor:
        if step % world.held == 0:
            self.action = self._draw(world)
        return self.action

    def _draw(self, world: World) -> Tensor:
        if world.num_choices:
            shape = (world.num_episodes, world.action_dim // world.num_choices)
            chosen = torch.randint(world.num_choices, shape, generator=self.generator)
            return functional.one_hot(chosen, world.num_choices).double().flatten(1)
        return torch.rand(world.num_episodes, world.action_dim, generator=self.generator, dtype=torch.float64) * 2 - 1


class Planning:
    """Receding-horizon control (MPC): plans, and follows the plan for some steps before it plans anew.

    Args:
        planner: Planner that searches for action sequences.
        look: Function from the current world to the cost of action sequences that start there.
        horizon: Number of steps H of a plan.
        generator: Random generator of the samples.
        deadline: Number of steps of the episode if the goal is to be met at its end; plans then do not reach beyond it.
        every: Number of steps between two plans.
        shrinking: Whether plans become shorter until the first H steps are over, and then begin anew: a plan that always
            reaches as far ahead puts off its arrival for ever.
    """

    def __init__(
        self,
        planner: Planner,
        look: Callable[[WorldType], Cost],
        horizon: int,
        generator: torch.Generator,
        deadline: int | None = None,
        every: int = 1,
        shrinking: bool = False,
    ) -> None:
        self.planner, self.look, self.horizon = planner, look, horizon
        self.generator, self.deadline, self.every, self.shrinking = generator, deadline, every, shrinking
        self.plan = torch.empty(0)
        self.predicted: list[Tensor] = []
        """Embeddings that a world model predicted under the actions that were taken, (E, `every`, D) a plan."""

    def __call__(self, world: World, step: int) -> Tensor:
        if step % self.every == 0:
            horizon = self.horizon - (step % self.horizon if self.shrinking else 0)
            horizon = horizon if self.deadline is None else min(horizon, self.deadline - step)
            further = False
            guess = torch.zeros(world.num_episodes, horizon, world.action_dim, device=self.generator.device)
            if step:
                left = self.plan[:, self.every :][:, :horizon]
                guess[:, : left.shape[1]] = left
                further = left.shape[1] > 0  # a plan that is used up is of no help to the next
            cost = self.look(world)  # type: ignore[arg-type]  # a controller acts in the kind of world that its cost knows
            self.plan = self.planner.plan(cost, guess, self.generator, further, world.num_choices)
            if isinstance(self.look, Imagination):
                self.predicted.append(self.look.predict(self.plan[:, : self.every]))
        return self.plan[:, step % self.every]


class Imagination:
    """Cost by a world model: the distance of predicted embeddings from that of the goal.

    Args:
        jepa: World model, an action-conditioned JEPA.
        goals: Windows of the goals, (E, 1, ...).
        planner: Planner whose kind of cost is used.
        goal_vectors: Vectors of the goals, (E, 1, ...), for a model that observes both.
    """

    def __init__(self, jepa: LatentDynamics, goals: Tensor, planner: Planner, goal_vectors: Tensor | None = None) -> None:
        self.jepa, self.kind = jepa, planner.cost
        self.goal = jepa.encode(goals, goal_vectors)[:, 0]  # (E, D)

    def __call__(self, world: World) -> Cost:
        vectors = world.vectors()
        self.start = self.jepa.encode(world.window().to(self.goal), None if vectors is None else vectors.to(self.goal))[:, 0]
        return latent_cost(self.jepa.predictor, self.start, self.goal, self.kind)

    @torch.no_grad()
    def predict(self, actions: Tensor) -> Tensor:
        """Embeddings (E, H, D) rolled out under actions (E, H, A) from the state of the last call."""
        return self.jepa.forecast(self.start, actions.shape[1], actions)


def run(world: WorldType, controller: Controller, num_steps: int) -> WorldType:
    """Let a controller act for some steps, and return the world."""
    for step in range(num_steps):
        world.act(controller(world, step))
    return world
