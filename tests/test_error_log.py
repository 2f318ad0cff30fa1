"""error.log: what is in it, when it is written, and when not."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from conftest import small_data, small_model, trainer
from lightning.pytorch import Callback

from callbacks import ErrorLog, Interrupted


class Fails(Callback):
    """Raise an error in a hook."""

    def __init__(self, hook: str, error: BaseException) -> None:
        def called(*_: Any) -> None:
            raise error

        setattr(self, hook, called)


def run(root: Path, stage: str, hook: str, error: BaseException, **changes: Any) -> list[str]:
    """The notes of an error that ended a stage of a run."""
    settings = {"max_steps": 2, "limit_val_batches": 1, "limit_predict_batches": 1}
    made = trainer(root, callbacks=[ErrorLog(), Fails(hook, error)], **(settings | changes))
    with pytest.raises(type(error)) as raised:
        getattr(made, stage)(small_model(), small_data())
    return getattr(raised.value, "__notes__", [])


@pytest.mark.parametrize(
    ("stage", "hook", "said"),
    [
        ("fit", "on_train_batch_start", "train, epoch 0, optimizer step 0"),
        ("fit", "on_train_batch_end", "train, epoch 0, optimizer step 1"),
        ("validate", "on_validation_batch_start", "validate, epoch 0, optimizer step 0"),
        ("predict", "on_predict_batch_start", "predict, epoch 0"),
    ],
)
def test_an_error_of_a_run_that_has_begun_is_kept(tmp_path: Path, stage: str, hook: str, said: str) -> None:
    notes = run(tmp_path, stage, hook, ValueError("what went wrong"))
    assert notes == [f"The traceback is in {tmp_path / 'error.log'}."]
    text = (tmp_path / "error.log").read_text()
    assert f"stage: {said}" in text and "ValueError: what went wrong" in text and "in called" in text
    assert "precision: 32-true" in text and "process: 0 of 1 on " in text and "versions: torch " in text


def test_other_processes_have_a_log_of_their_own(tmp_path: Path) -> None:
    class FailsInTheSecondOfTwo(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.strategy.global_rank = 1
            raise ValueError("mine alone")

    with pytest.raises(ValueError, match="mine alone") as raised:
        trainer(tmp_path, callbacks=[ErrorLog(), FailsInTheSecondOfTwo()], max_steps=2).fit(small_model(), small_data())
    assert raised.value.__notes__ == [f"The traceback is in {tmp_path / 'error-1.log'}."]
    assert "mine alone" in (tmp_path / "error-1.log").read_text() and not (tmp_path / "error.log").exists()


def test_an_error_before_the_first_batch_is_not(tmp_path: Path) -> None:
    for hook in ("on_fit_start", "on_sanity_check_start", "on_validation_batch_start"):
        assert run(tmp_path, "fit", hook, ValueError("a mistake"), num_sanity_val_steps=1) == []
    assert not (tmp_path / "error.log").exists()


@pytest.mark.parametrize("reason", [Interrupted(15), SystemExit(3), KeyboardInterrupt()])
def test_a_run_that_is_asked_to_end_has_made_no_error(tmp_path: Path, reason: BaseException) -> None:
    error = SystemExit if isinstance(reason, KeyboardInterrupt) else type(reason)
    made = trainer(tmp_path, callbacks=[ErrorLog(), Fails("on_train_batch_end", reason)], max_steps=2)
    with pytest.raises(error):
        made.fit(small_model(), small_data())
    assert not (tmp_path / "error.log").exists()


def test_a_log_that_cannot_be_written_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "error.log").mkdir()
    (note,) = run(tmp_path, "fit", "on_train_batch_end", ValueError("what went wrong"))
    assert note == f"(The traceback could not be written to {tmp_path / 'error.log'}: Is a directory.)"
