"""Roll-outs and the ratios by which forecasts are evaluated, number by number."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jepa_lightning.networks.predictor import PrefixPredictor
from jepa_lightning.rollouts import ForecastErrors, later_features, next_actions, unroll

SIZES = settings(deadline=None, derandomize=True, max_examples=60)


@SIZES
@given(frames=st.integers(2, 9), horizon=st.integers(1, 8), actions=st.integers(1, 3))
def test_targets_and_actions_of_every_start_are_those_of_its_own_time(frames: int, horizon: int, actions: int) -> None:
    horizon = min(horizon, frames - 1)
    times = torch.arange(frames, dtype=torch.float32)
    features = torch.stack([100 * trajectory + times for trajectory in range(3)])[..., None]  # (3, T, 1)
    acted = features[:, :-1].expand(-1, -1, actions) + torch.arange(actions) / 10  # acts from each time to the next
    later, on_the_way = later_features(features, horizon), next_actions(acted, horizon)
    assert later.shape == (3, frames - horizon, horizon, 1)
    assert on_the_way.shape == (3, frames - horizon, horizon, actions)
    for trajectory in range(3):
        for start in range(frames - horizon):
            for step in range(horizon):
                assert later[trajectory, start, step, 0] == 100 * trajectory + start + step + 1
                expected = 100 * trajectory + start + step + torch.arange(actions) / 10
                torch.testing.assert_close(on_the_way[trajectory, start, step], expected)
    assert next_actions(None, horizon) is None


def test_each_step_takes_its_own_action() -> None:
    start, actions = torch.tensor([[1.0], [2.0]]), torch.tensor([[[1.0], [10.0]], [[3.0], [5.0]]])
    found = unroll(lambda z, a: 2 * z + a, start, 2, actions)
    assert found[..., 0].tolist() == [[3.0, 16.0], [7.0, 19.0]]


def prefix_predictor(action_dim: int = 2, length: int = 3) -> PrefixPredictor:
    torch.manual_seed(0)
    predictor = PrefixPredictor(8, 32, action_dim, length).eval()
    torch.nn.init.normal_(predictor.change.weight, std=0.5)
    return predictor


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_prefix_predictor_sees_the_start_and_the_actions_so_far(changed: int) -> None:
    predictor, start, actions = prefix_predictor(), torch.randn(4, 5, 8), torch.randn(4, 5, 3, 2)
    other = actions.clone()
    other[..., changed, :] += 1
    with torch.no_grad():
        found, acted = unroll(predictor, start, 3, actions), unroll(predictor, start, 3, other)
        moved = unroll(predictor, start + torch.randn(8), 3, actions)
        torch.testing.assert_close(unroll(predictor, start[0, 0], 3, actions[0, 0]), found[0, 0], atol=1e-5, rtol=1e-5)
        for row in range(4):  # no row sees another
            torch.testing.assert_close(unroll(predictor, start[row], 3, actions[row]), found[row], atol=1e-5, rtol=1e-5)
    assert found.shape == (4, 5, 3, 8)
    predictor.train()  # the way that is trained, which torch computes in another one
    for parameter in predictor.parameters():
        parameter.grad = None
    learned = unroll(predictor, start, 3, actions)
    torch.testing.assert_close(learned, found, atol=1e-5, rtol=1e-5)
    learned.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in predictor.parameters())
    differs = (found - acted).abs().amax(dim=(0, 1, 3)) > 1e-4
    assert differs.tolist() == [step >= changed for step in range(3)]
    assert ((found - moved).abs().amax(dim=(0, 1, 3)) > 0.1).all()


def test_a_prefix_predictor_starts_anew_where_its_length_ends_and_says_nothing_untrained() -> None:
    predictor, start, actions = prefix_predictor(), torch.randn(4, 8), torch.randn(4, 7, 2)
    with torch.no_grad():
        whole = unroll(predictor, start, 7, actions)
        first = unroll(predictor, start, 3, actions[:, :3])
        second = unroll(predictor, first[:, -1], 3, actions[:, 3:6])
        third = predictor(second[:, -1], actions[:, 6])
        assert torch.equal(whole, torch.cat([first, second, third[:, None]], dim=1))
        still = PrefixPredictor(8, 32, 2)
        assert torch.equal(still.unroll(start, 7, actions), start[:, None].expand(-1, 7, -1))
        first_block, second_block = (block.linear1.weight for block in still.blocks)
        assert not torch.equal(first_block, second_block)
        with pytest.raises(ValueError, match="conditioned on actions: give some"):
            predictor.unroll(start, 3)
        with pytest.raises(ValueError, match="conditioned on nothing"):
            prefix_predictor(action_dim=0).unroll(start, 3, actions)
        free = prefix_predictor(action_dim=0).unroll(start, 4)  # what moves on its own: positions number the steps
    assert free.shape == (4, 4, 8) and not torch.allclose(free[:, 0], free[:, 1], atol=1e-3)


def ratios(errors: ForecastErrors, starts: Tensor, targets: Tensor, actions: Tensor | None) -> dict[str, float]:
    """Of a model that adds the action at each step, and nothing if there is none."""

    def forecast(features: Tensor, given: Tensor | None) -> Tensor:
        moves = torch.zeros_like(targets) if given is None else given.cumsum(dim=2)
        return features[:, :, None] + moves

    errors.update(forecast, starts, targets, actions)
    return {name: value.item() for name, value in errors.compute().items()}


def test_ratios_are_over_no_change_and_over_the_true_actions() -> None:
    starts = torch.zeros(2, 1, 1)
    actions = torch.tensor([[[[1.0], [1.0]]], [[[3.0], [3.0]]]])  # (B = 2, S = 1, H = 2, A = 1)
    # The truth goes half a unit less far at the first step, and one more at the second: errors 0.5, 0.5 and -1, -1.
    targets = actions.cumsum(dim=2) + torch.tensor([-0.5, 1.0])[:, None]
    first, last = targets[:, 0, 0, 0], targets[:, 0, 1, 0]  # 0.5 2.5 and 3 7
    found = ratios(ForecastErrors(True, 1), starts, targets, actions)
    assert found == {
        "persistence_ratio_first": pytest.approx(0.25 / first.square().mean().item()),
        "persistence_ratio": pytest.approx(1.0 / last.square().mean().item()),
        "normalized_error": pytest.approx(1 / last.var().item()),
        "shuffled_over_true": pytest.approx(((6 - 3) ** 2 + (2 - 7) ** 2) / 2),
        "zero_over_true": pytest.approx(last.square().mean().item()),
    }


def test_without_actions_there_is_nothing_to_shuffle_and_each_validation_starts_anew() -> None:
    errors = ForecastErrors(False, 1)
    starts, targets = torch.zeros(3, 2, 1), torch.ones(3, 2, 4, 1)
    nothing_learned = {"persistence_ratio_first": 1, "persistence_ratio": 1, "normalized_error": math.inf}  # all alike
    assert ratios(errors, starts, targets, None) == nothing_learned
    assert ratios(errors, starts + 1, 3 * targets, None) == nothing_learned
    errors.update(lambda z, a: 0.5 * targets, starts, targets, None)
    errors.update(lambda z, a: targets, starts, targets, None)
    assert errors.compute()["persistence_ratio"].item() == pytest.approx(0.125), "over all batches"


def test_a_trajectory_alone_has_no_other_to_take_actions_from() -> None:
    found = ratios(ForecastErrors(True, 1), torch.zeros(1, 1, 1), torch.ones(1, 1, 2, 1), torch.ones(1, 1, 2, 1))
    assert set(found) == {"persistence_ratio_first", "persistence_ratio", "normalized_error"}
