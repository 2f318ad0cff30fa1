"""Seconds of training, over all resumes."""

from types import SimpleNamespace

import pytest

from callbacks import Stopwatch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that goes when a test moves it."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("callbacks.stopwatch.time.monotonic", lambda: clock.now)
    return clock


def test_seconds_count_from_the_start_of_training(clock: SimpleNamespace) -> None:
    watch = Stopwatch()
    clock.now += 50  # data is prepared
    watch.on_train_start(None, None)
    clock.now += 7
    assert watch.state_dict() == {"seconds": 7}
    clock.now += 2
    assert watch.state_dict() == {"seconds": 9}, "reading it does not stop it"


def test_a_resumed_run_adds_to_what_was_before(clock: SimpleNamespace) -> None:
    watch = Stopwatch()
    watch.load_state_dict({"seconds": 100.0})
    clock.now += 50
    watch.on_train_start(None, None)
    clock.now += 7
    assert watch.state_dict() == {"seconds": 107}


def test_a_checkpoint_before_training_counts_from_the_making(clock: SimpleNamespace) -> None:
    watch = Stopwatch()
    clock.now += 3
    assert watch.state_dict() == {"seconds": 3}
