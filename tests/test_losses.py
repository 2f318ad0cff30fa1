"""Losses, number by number."""

import pytest
import torch

from jepa_lightning.losses import smooth_l1, squared_error, step_weights

PREDICTIONS = torch.tensor([[[1.0, 2.0], [0.0, 0.0], [3.0, -1.0]]])  # (1, H = 3, D = 2)
TARGETS = torch.tensor([[[0.0, 2.0], [0.5, 0.0], [0.0, 1.0]]])  # squared: 1 0, 0.25 0, 9 4


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (None, 14.25 / 6),
        ([1.0, 1.0, 1.0], 14.25 / 6),
        ([3.0, 0.0, 0.0], 3 * 0.5 / 3),  # the first weight is that of the first step
        ([0.0, 0.0, 3.0], 3 * 6.5 / 3),
        ([1.5, 1.0, 0.5], (1.5 * 0.5 + 0.125 + 0.5 * 6.5) / 3),
    ],
)
def test_squared_error_is_a_mean_under_the_weights_of_the_steps(weights: list[float] | None, expected: float) -> None:
    given = None if weights is None else torch.tensor(weights)
    assert squared_error(PREDICTIONS, TARGETS, given).item() == pytest.approx(expected)


def test_smooth_l1_is_quadratic_up_to_one_and_linear_beyond() -> None:
    expected = (0.5 * 1 + 0.5 * 0.25 + (3 - 0.5) + (2 - 0.5)) / 6
    assert smooth_l1(PREDICTIONS, TARGETS).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", [squared_error, smooth_l1])
def test_gradients_reach_predictions_alone(loss) -> None:
    predictions = PREDICTIONS.clone().requires_grad_()
    loss(predictions, TARGETS).backward()
    assert predictions.grad.sign().tolist() == (PREDICTIONS - TARGETS).sign().tolist(), "down the gradient is nearer"
    with pytest.raises(AssertionError, match="carry no gradient"):
        loss(predictions, TARGETS.clone().requires_grad_())


@pytest.mark.parametrize(
    ("horizon", "decay", "expected"),
    [
        (1, 2.0, [1.0]),
        (4, 0.0, [1.0, 1.0, 1.0, 1.0]),
        (2, 1.0, [4 / 3, 2 / 3]),
        (3, 2.0, [108 / 49, 27 / 49, 12 / 49]),
        (3, 2, [108 / 49, 27 / 49, 12 / 49]),  # a YAML that says 2
    ],
)
def test_weights_of_steps_fall_with_the_step_and_have_a_mean_of_one(horizon: int, decay: float, expected: list) -> None:
    weights = step_weights(horizon, decay)
    torch.testing.assert_close(weights, torch.tensor(expected))
    assert weights.dtype == torch.float32
