"""Planning: sample sequences of actions, ask a model what they lead to, keep what comes nearest to the goal.

Shapes: E episodes, N sampled sequences, H steps, A scalars of an action in [-1, 1], D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Cost = Callable[[Tensor], Tensor]
"""What sequences of actions (E, N, H, A) lead to, the less the better: (E, N)."""

Method = Literal["cem", "mppi"]
CostName = Literal["last", "summed"]

ROWS = 1024
"""Sequences that are imagined at a time on a CPU: more would leave its cache (4096 take a quarter longer)."""

LEAST_STD = 0.02
"""Below this, samples are all alike and nothing can be found."""


@dataclass
class Planner:
    """A search for the best sequence of actions, for many episodes at once.

    In each round, sequences are drawn from a normal distribution around the best guess, cut off at the limits, and judged.
    "cem", the cross-entropy method (Rubinstein 1999), makes mean and deviation those of the best few; "mppi", model
    predictive path integral control (Williams et al. 2017), those of all samples under the weights
    exp(-(cost - least cost) / (temperature * deviation of the costs)), so that the temperature has no unit.

    Args:
        method: "cem" or "mppi".
        num_samples: N, sequences per round and episode.
        num_iterations: Rounds of a plan from scratch.
        num_further_iterations: Rounds where the plan of the step before is at hand.
        num_elites: How many samples count as the best, for "cem".
        temperature: For "mppi": small looks at the best samples alone.
        initial_std: Deviation of the actions in the first round.
        cost: "last" judges the features of the last step, "summed" those of all steps.

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
                raise ValueError(f"planner.{name}={getattr(self, name)}: give a whole number of at least 1.")
        if not 2 <= self.num_elites <= self.num_samples:
            raise ValueError(f"planner.num_elites={self.num_elites}: choose 2 to num_samples={self.num_samples}.")
        for name in ("temperature", "initial_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"planner.{name}={getattr(self, name)}: must be positive.")

    @torch.no_grad()
    def plan(self, cost: Cost, guess: Tensor, generator: torch.Generator, further: bool = False) -> Tensor:
        """The best sequences found.

        Args:
            cost: What sequences lead to.
            guess: (E, H, A), where to look first.
            generator: On the device of `guess`; same generator, same plan.
            further: Whether the guess is a plan already.

        Returns:
            (E, H, A) in [-1, 1].
        """
        mean, std = guess, torch.full_like(guess, self.initial_std)
        for _ in range(self.num_further_iterations if further else self.num_iterations):
            noise = torch.randn(
                len(mean), self.num_samples, *mean.shape[1:], generator=generator, device=mean.device, dtype=mean.dtype
            )
            samples = (mean[:, None] + std[:, None] * noise).clamp_(-1, 1)
            samples[:, 0] = mean  # what is known is not forgotten
            mean, std = self._improve(samples, cost(samples))
        return mean

    def _improve(self, samples: Tensor, costs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the next round, (E, H, A) each, from samples (E, N, H, A) and their costs (E, N)."""
        if self.method == "cem":
            best = costs.topk(self.num_elites, dim=1, largest=False).indices
            elites = samples.gather(1, best[..., None, None].expand(-1, -1, *samples.shape[2:]))
            return elites.mean(dim=1), elites.std(dim=1).clamp_(min=LEAST_STD)
        above = costs - costs.amin(dim=1, keepdim=True)
        scale = self.temperature * costs.std(dim=1, keepdim=True).clamp(min=1e-12)
        weights = (-above / scale).softmax(dim=1)[..., None, None]  # (E, N, 1, 1)
        mean = (weights * samples).sum(dim=1)
        variance = (weights * (samples - mean[:, None]).square()).sum(dim=1)
        return mean, variance.sqrt().clamp_(min=LEAST_STD)


def latent_cost(predictor: nn.Module, start: Tensor, goal: Tensor, kind: CostName) -> Cost:
    """Mean squared difference of imagined features from those of the goal.

    Args:
        predictor: Features (..., D) and actions (..., A) -> features one step later.
        start: (E, D).
        goal: (E, D).
        kind: "last" looks at the last step, "summed" at all of them.
    """

    def imagine(actions: Tensor, features: Tensor, target: Tensor) -> Tensor:
        features = features[:, None].expand(-1, actions.shape[1], -1)
        total = features.new_zeros(actions.shape[:2])
        for step in range(actions.shape[2]):
            features = predictor(features, actions[:, :, step])
            if kind == "summed" or step == actions.shape[2] - 1:
                total = total + (features - target[:, None]).square().mean(dim=-1)
        return total

    def cost(actions: Tensor) -> Tensor:
        episodes = max(1, ROWS // actions.shape[1]) if actions.device.type == "cpu" else len(actions)
        parts = (part.split(episodes) for part in (actions, start, goal))
        return torch.cat([imagine(*part) for part in zip(*parts, strict=True)])

    return cost
