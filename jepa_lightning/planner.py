"""Planning in latent space: sample action sequences, roll them out, keep those that come nearest to the goal.

Shapes: E episodes, N sampled sequences, H steps, A scalars of an action, D embedding dimension, G actions of a step, each of
C choices. Actions are continuous, in [-1, 1], or discrete: A = G * C, one-hot vectors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from jepa_lightning.rollouts import unroll

Cost = Callable[[Tensor], Tensor]
"""Cost of action sequences (E, N, H, A), the lower the better: (E, N)."""

Method = Literal["cem", "mppi"]
CostName = Literal["last", "summed"]

ROWS = 1024
"""Sequences that are rolled out at a time on a CPU: more would leave its cache (4096 take a quarter longer)."""

MIN_STD = 0.02
"""Below this, samples are all alike and nothing can be found."""

MIN_PROBABILITY = 0.02
"""Likewise for discrete actions: no choice is ever less probable in a sample, before all are normalized."""


@dataclass
class Planner:
    """A search for the best action sequence, for many episodes at once.

    In each round, sequences are drawn from a normal distribution around the best guess, clipped to the limits, evaluated;
    of discrete actions, from a categorical distribution for each step, whose probabilities take the place of the mean.
    "cem", the cross-entropy method (Rubinstein 1999), takes mean and standard deviation from the elites; "mppi", model
    predictive path integral control (Williams et al. 2017), from all samples under the weights
    exp(-(cost - lowest cost) / (temperature * standard deviation of the costs)), so that the temperature has no unit.

    >>> def cost(actions):  # (E, N, H, A) -> (E, N): the first action should be a half
    ...     return (actions[:, :, 0, 0] - 0.5).square()
    >>> Planner().plan(cost, torch.zeros(1, 3, 1), torch.Generator().manual_seed(0))[0, 0, 0].round(decimals=1)
    tensor(0.5000)

    Args:
        method: Planning method, "cem" or "mppi".
        num_samples: Number of sequences N per round and episode.
        num_iterations: Number of rounds of a plan from scratch.
        num_further_iterations: Number of rounds of a plan that starts from that of the step before.
        num_elites: Number of elites, the best samples, for "cem".
        temperature: Temperature of the weights, for "mppi": a low one weighs the best samples alone.
        initial_std: Standard deviation of the actions in the first round.
        cost: "last" takes the distance from the goal at the last step, "summed" that at all steps.

    Raises:
        ValueError: A value out of its range, named together with what is allowed.
    """

    method: Method = "cem"
    num_samples: int = 300
    num_iterations: int = 30
    num_further_iterations: int = 10
    num_elites: int = 30
    temperature: float = 0.3
    initial_std: float = 0.7
    cost: CostName = "last"

    def __post_init__(self) -> None:
        for name, allowed in (("method", get_args(Method)), ("cost", get_args(CostName))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"planner.{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}.")
        for name in ("num_samples", "num_iterations", "num_further_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"planner.{name}={getattr(self, name)}: give an integer of at least 1.")
        if not 2 <= self.num_elites <= self.num_samples:
            raise ValueError(f"planner.num_elites={self.num_elites}: choose 2 to num_samples={self.num_samples}.")
        for name in ("temperature", "initial_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"planner.{name}={getattr(self, name)}: must be positive.")

    @torch.no_grad()
    def plan(
        self, cost: Cost, guess: Tensor, generator: torch.Generator, further: bool = False, num_choices: int = 0
    ) -> Tensor:
        """The best sequences found.

        Args:
            cost: Cost of action sequences.
            guess: Initial mean of the sequences, (E, H, A); zeros where nothing is known.
            generator: Random generator on the device of `guess`; same generator, same plan.
            further: Whether the guess is a plan already.
            num_choices: Number of choices C of a discrete action; 0 for continuous actions.

        Returns:
            (E, H, A) in [-1, 1], or one-hot vectors of discrete actions.
        """
        if num_choices:
            return self._choose(cost, guess, generator, further, num_choices)
        mean, std = guess, torch.full_like(guess, self.initial_std)
        for _ in range(self.num_further_iterations if further else self.num_iterations):
            noise = torch.randn(
                len(mean), self.num_samples, *mean.shape[1:], generator=generator, device=mean.device, dtype=mean.dtype
            )
            samples = (mean[:, None] + std[:, None] * noise).clamp_(-1, 1)
            samples[:, 0] = mean  # what is known is not forgotten
            mean, std = self._improve(samples, cost(samples))
        return mean

    def _choose(self, cost: Cost, guess: Tensor, generator: torch.Generator, further: bool, num_choices: int) -> Tensor:
        """Plan discrete actions: as `plan`."""
        known = guess.unflatten(-1, (-1, num_choices))  # (E, H, G, C)
        probabilities = torch.where(known.sum(dim=-1, keepdim=True) > 0, known, 1 / num_choices)
        for _ in range(self.num_further_iterations if further else self.num_iterations):
            spread = probabilities.clamp(min=MIN_PROBABILITY)[:, None].expand(-1, self.num_samples, -1, -1, -1)
            drawn = torch.multinomial(spread.flatten(0, -2), 1, generator=generator).view(spread.shape[:-1])
            drawn[:, 0] = probabilities.argmax(dim=-1)  # what is known is not forgotten
            samples = functional.one_hot(drawn, num_choices).to(guess.dtype).flatten(-2)  # (E, N, H, A)
            probabilities = self._improve(samples, cost(samples))[0].unflatten(-1, (-1, num_choices))
        return functional.one_hot(probabilities.argmax(dim=-1), num_choices).to(guess.dtype).flatten(-2)

    def _improve(self, samples: Tensor, costs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the next round, (E, H, A) each, of samples (E, N, H, A) with costs (E, N)."""
        if self.method == "cem":
            best = costs.topk(self.num_elites, dim=1, largest=False).indices
            elites = samples.gather(1, best[..., None, None].expand(-1, -1, *samples.shape[2:]))
            return elites.mean(dim=1), elites.std(dim=1).clamp_(min=MIN_STD)
        above = costs - costs.amin(dim=1, keepdim=True)
        scale = self.temperature * costs.std(dim=1, keepdim=True).clamp(min=1e-12)
        weights = (-above / scale).softmax(dim=1)[..., None, None]  # (E, N, 1, 1)
        mean = (weights * samples).sum(dim=1)
        variance = (weights * (samples - mean[:, None]).square()).sum(dim=1)
        return mean, variance.sqrt().clamp_(min=MIN_STD)


def latent_cost(predictor: nn.Module, start: Tensor, goal: Tensor, kind: CostName) -> Cost:
    """Mean squared distance in embedding space of rolled-out embeddings from the goal's.

    Args:
        predictor: Predictor, as `rollouts.unroll` takes it.
        start: Embeddings to start from, (E, D).
        goal: Embeddings of the goals, (E, D).
        kind: "last" takes the distance at the last step, "summed" the sum over all of them.
    """

    def rollout_cost(actions: Tensor, features: Tensor, target: Tensor) -> Tensor:
        features = features[:, None].expand(-1, actions.shape[1], -1)
        steps = unroll(predictor, features, actions.shape[2], actions)  # (E, N, H, D)
        distances = (steps if kind == "summed" else steps[:, :, -1:]) - target[:, None, None]
        return distances.square().mean(dim=-1).sum(dim=-1)

    return in_chunks(rollout_cost, start, goal)


def in_chunks(cost_of: Callable[..., Tensor], *starts: Tensor) -> Cost:
    """A cost that is computed for a few episodes at a time on a CPU, whose cache more would leave.

    Args:
        cost_of: From actions (E, N, H, A) and what is given here, cut to the same episodes, to costs (E, N).
        starts: What differs between episodes, (E, ...) each.
    """

    def cost(actions: Tensor) -> Tensor:
        episodes = max(1, ROWS // actions.shape[1]) if actions.device.type == "cpu" else len(actions)
        parts = (part.split(episodes) for part in (actions, *starts))
        return torch.cat([cost_of(*part) for part in zip(*parts, strict=True)])

    return cost
