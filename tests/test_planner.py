"""The search: it finds the best sequences, within the limits."""

import pytest
import torch
from conftest import small_driven_model
from test_planning import seeded

from jepa_lightning.planner import Planner, latent_cost


def bowl(goals: torch.Tensor):
    """Lowest at a sequence of its own for each episode: goals (E, H, A)."""
    return lambda actions: (actions - goals[:, None]).square().sum(dim=(2, 3))


@pytest.mark.parametrize("method", ["cem", "mppi"])
def test_the_search_finds_the_best_sequence_of_each_episode(method: str) -> None:
    goals = torch.rand(6, 4, 2, generator=seeded()) * 1.6 - 0.8
    found = Planner(method=method).plan(bowl(goals), torch.zeros(6, 4, 2), seeded(1))
    assert (found - goals).abs().max() < 0.1
    again = Planner(method=method).plan(bowl(goals), torch.zeros(6, 4, 2), seeded(1))
    assert torch.equal(found, again), "same generator, same plan"


@pytest.mark.parametrize("method", ["cem", "mppi"])
def test_plans_respect_the_limits(method: str) -> None:
    goals = torch.full((2, 3, 2), 5.0)
    evaluated = []

    def cost(actions: torch.Tensor) -> torch.Tensor:
        evaluated.append(actions.abs().amax().item())
        return bowl(goals)(actions)

    found = Planner(method=method).plan(cost, torch.zeros(2, 3, 2), seeded())
    assert max(evaluated) <= 1 and found.abs().max() <= 1
    assert found.min() > 0.9


def test_a_good_guess_is_not_forgotten() -> None:
    goals = torch.full((1, 10, 2), 0.5)
    short = Planner(
        num_samples=20, num_iterations=1, num_further_iterations=1, num_elites=2, method="mppi", temperature=0.01
    )
    found = short.plan(bowl(goals), goals, seeded(), further=True)
    assert (found - goals).abs().max() < 0.05


def test_further_plans_take_fewer_rounds() -> None:
    calls: list[int] = []

    def cost(actions: torch.Tensor) -> torch.Tensor:
        calls.append(actions.shape[1])
        return actions.sum(dim=(2, 3))

    planner = Planner(num_iterations=7, num_further_iterations=3)
    planner.plan(cost, torch.zeros(1, 2, 2), seeded())
    assert calls == [300] * 7
    planner.plan(cost, torch.zeros(1, 2, 2), seeded(), further=True)
    assert len(calls) == 10


@pytest.mark.parametrize("kind", ["last", "summed"])
def test_latent_cost_is_the_distance_of_the_roll_out_from_the_goal(kind: str) -> None:
    """Also in parts, which is how a CPU computes it."""
    model = small_driven_model()
    for parameter in model.predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    start, goal, actions = torch.randn(30, 8), torch.randn(30, 8), torch.rand(30, 300, 4, 2) * 2 - 1
    with torch.no_grad():
        costs = latent_cost(model.predictor, start, goal, kind)(actions)
        for episode, sample in ((0, 0), (17, 299), (29, 5)):
            steps = model.forecast(start[episode], 4, actions[episode, sample])  # (H, D)
            errors = (steps - goal[episode]).square().mean(dim=-1)
            torch.testing.assert_close(costs[episode, sample], errors[-1] if kind == "last" else errors.sum())


@pytest.mark.parametrize("method", ["cem", "mppi"])
def test_discrete_sequences_are_one_hot_and_the_best_is_found(method: str) -> None:
    wanted = torch.tensor([[[2, 0], [1, 1]], [[0, 1], [2, 2]]])  # (E, H, G): two choices a step, of three each
    goal = torch.nn.functional.one_hot(wanted, 3).float().flatten(2)  # (E, H, A)

    def cost(actions: torch.Tensor) -> torch.Tensor:
        assert set(actions.unique().tolist()) <= {0.0, 1.0} and actions.unflatten(-1, (-1, 3)).sum(-1).unique().tolist() == [
            1.0
        ]
        return (actions - goal[:, None]).abs().sum(dim=(2, 3))

    planner = Planner(method=method, num_samples=64, num_elites=8, num_iterations=10, num_further_iterations=1)
    found = planner.plan(cost, torch.zeros(2, 2, 6), torch.Generator().manual_seed(0), num_choices=3)
    assert torch.equal(found, goal)
    again = planner.plan(cost, goal, torch.Generator().manual_seed(1), further=True, num_choices=3)
    assert torch.equal(again, goal), "what is known is not forgotten"
    rounds: list[int] = []

    def at_random(actions: torch.Tensor) -> torch.Tensor:
        rounds.append(len(actions))
        return (actions * torch.arange(12).view(2, 6)).sum(dim=(2, 3)) % 1.7

    plans = [planner.plan(at_random, torch.zeros(2, 2, 6), seeded(2), further, 3) for further in (False, True, True)]
    assert len(rounds) == 10 + 1 + 1 and torch.equal(plans[1], plans[2]), "same generator, same plan; fewer further rounds"
    assert all(plan.shape == (2, 2, 6) for plan in plans)
    partly = torch.cat([goal[:, 1:], torch.zeros(2, 1, 6)], dim=1)
    assert planner.plan(lambda actions: torch.rand(2, 64), partly, torch.Generator(), num_choices=3).sum() == 8
