"""Schedules, step by step."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from callbacks.schedules import SCHEDULES, constant, cosine, late_rise, linear, total_optimizer_steps, warmup_cosine

PROPERTY = settings(deadline=None, derandomize=True, max_examples=200)
TOTALS = st.integers(1, 10**6)
VALUES = st.floats(-1e3, 1e3)


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


def test_warmup_goes_from_zero_to_zero_unless_set_otherwise() -> None:
    assert [warmup_cosine(step, 4, 2) for step in range(5)] == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-12)
    assert warmup_cosine(0, 4, 0) == 1.0, "without a warm-up the first step takes the peak"
    assert warmup_cosine(4, 4, 2, end=0.3) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (30, 0.0), (32, 0.2), (35, 0.5), (40, 1.0), (41, 1.0), (100, 1.0), (120, 1.0)]
)
def test_a_weight_that_rises_late(step: int, expected: float) -> None:
    assert late_rise(step, 100, 0.3) == pytest.approx(expected, abs=1e-12)
    assert late_rise(step, 100, 0.3, length=0.2) == pytest.approx(min(expected, max(0.0, (step - 30) / 20)), abs=1e-12)
    assert late_rise(100, 100, 0.9) == pytest.approx(1.0)


def test_names_of_schedules() -> None:
    assert SCHEDULES == {"cosine": cosine, "linear": linear, "constant": constant}


@PROPERTY
@given(total=TOTALS, start=VALUES, end=VALUES, name=st.sampled_from(["cosine", "linear"]), data=st.data())
def test_a_schedule_goes_from_start_to_end_without_turning_back(total, start, end, name, data) -> None:
    first, later = sorted(data.draw(st.tuples(st.integers(0, 2 * total), st.integers(0, 2 * total))))
    schedule = SCHEDULES[name]
    span = 1e-9 * (1 + abs(start) + abs(end))  # rounding
    assert schedule(0, total, start, end) == pytest.approx(start, abs=span)
    assert schedule(total, total, start, end) == schedule(total + 5, total, start, end) == pytest.approx(end, abs=span)
    way = math.copysign(1, end - start)
    assert way * (schedule(later, total, start, end) - schedule(first, total, start, end)) >= -span
    assert min(start, end) - span <= schedule(first, total, start, end) <= max(start, end) + span
    # Symmetric about its middle: what is gone after k steps is what is left k steps before the end.
    if first <= total:
        gone = schedule(first, total, start, end) - start
        assert end - schedule(total - first, total, start, end) == pytest.approx(gone, abs=2 * span)


@PROPERTY
@given(total=st.integers(2, 10**5), start=st.floats(0, 1), end=st.floats(0, 1), data=st.data())
def test_a_learning_rate_rises_to_its_peak_and_falls(total, start, end, data) -> None:
    warmup = data.draw(st.integers(0, total - 1))
    step = data.draw(st.integers(0, total + 3))
    value, following = (warmup_cosine(k, total, warmup, start, end) for k in (step, step + 1))
    assert warmup_cosine(warmup, total, warmup, start, end) == 1.0, "the peak"
    assert min(start, end) - 1e-9 <= value <= 1.0
    assert following >= value - 1e-9 if step < warmup else following <= value + 1e-9
    assert abs(following - value) <= 1 / max(1, warmup) + math.pi / 2 / (total - warmup) + 1e-9, "it makes no jump"


def test_constant_is_constant_and_refuses_two_values() -> None:
    assert constant(7, 10, 0.99, 0.99) == 0.99
    with pytest.raises(ValueError, match="constant schedule cannot go from 0.9 to 1.0"):
        constant(0, 10, 0.9, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-1, 10, 0, 0), "step=-1"), ((0, 0, 0, 0), "total=0")],
)
def test_impossible_steps_are_refused(arguments: tuple, message: str) -> None:
    for schedule in SCHEDULES.values():
        with pytest.raises(ValueError, match=message):
            schedule(*arguments)
    assert cosine(1, 1, 0.0, 5.0) == 5.0, "one step is enough"


@pytest.mark.parametrize("warmup", [10, 11, -1])
def test_warmup_as_long_as_training_is_refused(warmup: int) -> None:
    with pytest.raises(ValueError, match=f"warmup={warmup} of total=10"):
        warmup_cosine(0, 10, warmup)


@pytest.mark.parametrize("steps", [math.inf, -1, 0])
def test_endless_training_is_refused(steps: float) -> None:
    with pytest.raises(ValueError, match=r"max_epochs or trainer\.max_steps"):
        total_optimizer_steps(SimpleNamespace(estimated_stepping_batches=steps))


@pytest.mark.parametrize("steps", [1, 2500.0])
def test_steps_of_a_training_run_are_a_whole_number(steps: float) -> None:
    total = total_optimizer_steps(SimpleNamespace(estimated_stepping_batches=steps))
    assert total == steps and type(total) is int
