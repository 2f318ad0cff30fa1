"""Time of a plan in latent space, batched over episodes, compared with a plain loop and the bare matrix products.

    python benchmarks/planning.py

A plan is 30 rounds of 300 sequences of 5 actions, with the networks of configs/pendulum/actuated.yaml; the time does not
depend on what they have learned. The plain loop is the cross-entropy method as one writes it first, an episode after the
other. The floor is the three matrix products of the predictor for as many rows, in as large pieces.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from jepa_lightning import PendulumJEPA
from jepa_lightning.planner import ROWS, Planner, latent_cost

EPISODES, STEPS, LIMIT = 16, 5, 1.0


def plain_plan(jepa: PendulumJEPA, start: Tensor, goal: Tensor, planner: Planner) -> Tensor:
    """One episode: start and goal (D,) -> (H, A)."""
    mean, std = torch.zeros(STEPS, 2), torch.full((STEPS, 2), planner.initial_std)
    for _ in range(planner.num_iterations):
        actions = (mean + std * torch.randn(planner.num_samples, STEPS, 2)).clamp(-1, 1)
        predicted = jepa.forecast(start.expand(planner.num_samples, -1), STEPS, actions)
        costs = (predicted[:, -1] - goal).square().mean(dim=-1)
        elites = actions[costs.argsort()[: planner.num_elites]]
        mean, std = elites.mean(dim=0), elites.std(dim=0)
    return mean


def seconds(function: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


@torch.no_grad()
def main() -> None:
    """Print the times of an episode, and their ratios."""
    jepa, planner = PendulumJEPA(history=3, action_dim=2, horizon=STEPS), Planner()
    starts, goals = torch.randn(EPISODES, 64), torch.randn(EPISODES, 64)
    rows = EPISODES * planner.num_samples * planner.num_iterations * STEPS
    widths = [
        (layer.in_features, layer.out_features) for layer in jepa.predictor.change if isinstance(layer, torch.nn.Linear)
    ]
    factors = [(torch.randn(ROWS, inputs), torch.randn(inputs, outputs)) for inputs, outputs in widths]

    def batched() -> None:
        cost = latent_cost(jepa.predictor, starts, goals, planner.cost)
        planner.plan(cost, torch.zeros(EPISODES, STEPS, 2), torch.Generator().manual_seed(0))

    def plain() -> None:
        for start, goal in zip(starts[:4], goals[:4], strict=True):
            plain_plan(jepa, start, goal, planner)

    def floor() -> None:
        for _ in range(rows // ROWS):
            for left, right in factors:
                left @ right

    best = [float("inf")] * 3
    for _ in range(3):  # in turns, so that a busy machine slows all of them
        found = [seconds(batched) / EPISODES, seconds(plain) / 4, seconds(floor) / EPISODES]
        best = [min(pair) for pair in zip(best, found, strict=True)]
    mine, reference, bare = best
    print(
        f"plan of {planner.num_samples} samples x {planner.num_iterations} rounds x {STEPS} steps, {EPISODES} episodes at "
        f"once, {torch.get_num_threads()} threads: {mine:.2f} s an episode (limit {LIMIT}); plain loop {reference:.2f} s "
        f"({reference / mine:.2f} times); matrix products alone {bare:.2f} s ({100 * bare / mine:.0f} % of our time)"
    )


if __name__ == "__main__":
    main()
