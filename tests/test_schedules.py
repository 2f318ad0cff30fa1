"""Schedules, step by step."""

import math
from types import SimpleNamespace

import pytest

from callbacks.schedules import constant, cosine, linear, total_optimizer_steps, warmup_cosine


@pytest.mark.parametrize(
    ("function", "step", "expected"),
    [
        (cosine, 0, 0.9),
        (cosine, 25, 1.0 - 0.1 * 0.5 * (1 + math.cos(math.pi / 4))),
        (cosine, 50, 0.95),
        (cosine, 100, 1.0),
        (cosine, 130, 1.0),  # held after the end
        (linear, 0, 0.9),
        (linear, 25, 0.925),
        (linear, 100, 1.0),
        (linear, 999, 1.0),
    ],
)
def test_from_start_to_end(function, step: int, expected: float) -> None:
    value = function(step, 100, 0.9, 1.0)
    assert type(value) is float  # a numpy float could not be read with weights_only
    assert value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.1),
        (5, 0.55),  # halfway up
        (10, 1.0),  # end of the warm-up
        (55, 0.5),  # halfway down
        (100, 0.0),
        (150, 0.0),  # does not rise again
    ],
)
def test_warmup_then_cosine(step: int, expected: float) -> None:
    assert warmup_cosine(step, 100, 10, start=0.1) == pytest.approx(expected, abs=1e-12)


def test_constant_is_constant_and_refuses_two_values() -> None:
    assert constant(7, 10, 0.99, 0.99) == 0.99
    with pytest.raises(ValueError, match="constant schedule cannot go from 0.9 to 1.0"):
        constant(0, 10, 0.9, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-1, 10, 0, 1), "step=-1"), ((0, 0, 0, 1), "total=0")],
)
def test_impossible_steps_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cosine(*arguments)


def test_warmup_as_long_as_training_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup=10 of total=10"):
        warmup_cosine(0, 10, 10)


@pytest.mark.parametrize("steps", [math.inf, -1, 0])
def test_endless_training_is_refused(steps: float) -> None:
    with pytest.raises(ValueError, match=r"max_epochs or trainer\.max_steps"):
        total_optimizer_steps(SimpleNamespace(estimated_stepping_batches=steps))
