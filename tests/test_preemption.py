"""Signals: the step is finished, saved, and the exit code says so; SLURM's requeueing."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from conftest import small_data, small_model, trainer
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback
from test_going_on import fit, last

from callbacks import Interrupted, LastCheckpoint, Preemption
from jepa_lightning.weights.checkpoints import read_checkpoint


class Signal(Callback):
    """A signal to this process in the middle of a step, after the gradients and before the optimizer."""

    def __init__(self, number: int, step: int, hook: str = "on_before_optimizer_step") -> None:
        def called(run: pl.Trainer, *_: Any) -> None:
            if run.global_step == step and not run.sanity_checking:
                os.kill(os.getpid(), number)

        setattr(self, hook, called)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)]
)  # fmt: skip
def test_a_signal_ends_the_step_saves_and_says_so_by_its_code(tmp_path: Path, number: int, code: int) -> None:
    before, preemption = signal.getsignal(number), Preemption()
    run = trainer(
        tmp_path, max_steps=9, enable_checkpointing=True, callbacks=[Signal(number, 3), LastCheckpoint(), preemption]
    )
    with pytest.raises(Interrupted) as stopped:
        run.fit(small_model(), small_data())
    assert stopped.value.code == code
    assert read_checkpoint(last(tmp_path))["global_step"] == 4, "the step that was under way is in it"
    assert signal.getsignal(number) == before
    with pytest.raises(Interrupted):  # a signal after the end of the run is not noted for a later step
        preemption._note(number, None)


def test_a_validation_is_left_at_its_next_batch(tmp_path: Path) -> None:
    callbacks = [Signal(signal.SIGTERM, 6, "on_validation_batch_start"), Preemption()]
    run = trainer(tmp_path, max_steps=9, enable_checkpointing=True, callbacks=callbacks, limit_val_batches=1.0)
    with pytest.raises(Interrupted):
        run.fit(small_model(), small_data(val_size=16))
    assert (
        read_checkpoint(last(tmp_path))["global_step"] == 6
        and run.fit_loop.epoch_loop.val_loop.batch_progress.current.ready == 1
    )


def test_a_second_ctrl_c_ends_without_saving(tmp_path: Path) -> None:
    callbacks = [Signal(signal.SIGINT, 3), Signal(signal.SIGINT, 3, "on_before_zero_grad"), Preemption()]
    run = trainer(tmp_path, max_steps=9, enable_checkpointing=True, callbacks=callbacks)
    with pytest.raises(Interrupted):
        run.fit(small_model(), small_data())
    assert not (tmp_path / "checkpoints").exists()


class SignalInSanityCheck(Callback):
    """SIGTERM before training has begun."""

    def on_validation_batch_start(self, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_before_training_there_is_nothing_to_save(tmp_path: Path) -> None:
    callbacks = [Preemption(), SignalInSanityCheck()]
    settings = {"limit_val_batches": 1, "num_sanity_val_steps": 1, "callbacks": callbacks, "enable_checkpointing": True}
    run = trainer(tmp_path, max_steps=9, **settings)
    with pytest.raises(Interrupted) as stopped:
        run.fit(small_model(), small_data())
    assert stopped.value.code == 143 and not (tmp_path / "checkpoints").exists()


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A job of one process: what scontrol is asked. (With a real program in benchmarks/faults.py.)"""
    asked: list[list[str]] = []

    def run(command: list[str], text: bool = False, **_: Any) -> subprocess.CompletedProcess:
        asked.append(command)
        code, said = (1, b"no such job\n") if os.environ.get("SCONTROL_FAILS") else (0, b"")
        return subprocess.CompletedProcess(command, code, "", said.decode() if text else said)

    monkeypatch.setattr("callbacks.preemption.subprocess.run", run)
    for name, value in {"JOB_ID": "7", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "x"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return asked


def requeued(root: Path, number: int, step: int, path: Path | None = None, **slurm: Any) -> int:
    """The exit code of a job that is signalled in a step."""
    callbacks = [Signal(number, step), LastCheckpoint(), Preemption()]
    settings = {"max_steps": 9, "enable_checkpointing": True, "callbacks": callbacks, "plugins": [SLURMEnvironment(**slurm)]}
    with pytest.raises(Interrupted) as stopped:
        trainer(root, **settings).fit(small_model(), small_data(), ckpt_path=path)
    return stopped.value.code


def test_a_requeued_job_goes_on_from_its_newest_checkpoint(
    tmp_path: Path, slurm: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert requeued(tmp_path, signal.SIGUSR1, 2) == 138
    assert slurm == [["scontrol", "requeue", "7"]]
    first = tmp_path / "hpc_ckpt_1.ckpt"
    assert read_checkpoint(first)["global_step"] == 3 and not (tmp_path / "checkpoints" / "last.ckpt").exists()
    assert f"SIGUSR1: saved {first} at optimizer step 3; go on with --ckpt_path last." in capsys.readouterr().out
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert requeued(tmp_path, signal.SIGUSR1, 4, first) == 138
    assert slurm[1:] == [["scontrol", "requeue", "5_2"]]
    assert [path.name for path in tmp_path.glob("hpc*")] == ["hpc_ckpt_2.ckpt"]
    assert requeued(tmp_path, signal.SIGTERM, 6, tmp_path / "hpc_ckpt_2.ckpt") == 143, "SIGTERM is no reason to requeue"
    assert len(slurm) == 2 and read_checkpoint(last(tmp_path))["global_step"] == 7
    fit(tmp_path, 9, last(tmp_path))
    assert not list(tmp_path.glob("hpc*")), "a finished run leaves nothing from which its directory would go on"


def test_a_job_that_is_requeued_in_its_last_step_has_its_end_in_last_ckpt(tmp_path: Path, slurm: list) -> None:
    assert requeued(tmp_path, signal.SIGUSR1, 8) == 138 and len(slurm) == 1
    first = tmp_path / "hpc_ckpt_1.ckpt"
    assert read_checkpoint(first)["global_step"] == read_checkpoint(last(tmp_path))["global_step"] == 9
    fit(tmp_path, 9, first)  # has nothing left to do
    assert read_checkpoint(last(tmp_path))["global_step"] == 9


def test_the_signal_of_a_job_is_its_own_and_requeueing_can_be_declined(tmp_path: Path, slurm: list) -> None:
    for number, settings in (
        (signal.SIGUSR1, {"auto_requeue": False}),
        (signal.SIGUSR1, {"requeue_signal": signal.SIGUSR2}),
    ):
        assert requeued(tmp_path, number, 2, **settings) == 138
        assert not slurm and not list(tmp_path.glob("hpc*")) and read_checkpoint(last(tmp_path))["global_step"] == 3
    assert requeued(tmp_path, signal.SIGUSR2, 2, requeue_signal=signal.SIGUSR2) == 128 + signal.SIGUSR2
    assert len(slurm) == 1 and (tmp_path / "hpc_ckpt_1.ckpt").exists()
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)


def test_a_job_that_cannot_be_requeued_says_so(
    tmp_path: Path, slurm: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("SCONTROL_FAILS", "1")
    assert requeued(tmp_path, signal.SIGUSR1, 2) == 138 and len(slurm) == 1
    assert "scontrol requeue 7 failed: no such job. Start the job again by hand." in capsys.readouterr().err


def test_a_run_without_a_last_checkpoint_of_its_own_still_saves_one(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=9, enable_checkpointing=True, callbacks=[Signal(signal.SIGTERM, 3), Preemption()])
    with pytest.raises(Interrupted):
        run.fit(small_model(), small_data())
    assert read_checkpoint(last(tmp_path))["global_step"] == 4


def test_nothing_is_written_twice_for_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callbacks = [Signal(signal.SIGTERM, 3), LastCheckpoint(every_n_train_steps=2), Preemption()]
    run = trainer(tmp_path, max_steps=9, enable_checkpointing=True, callbacks=callbacks)
    with pytest.raises(Interrupted):
        run.fit(small_model(), small_data())
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["last-1.ckpt", "last.ckpt"], "of steps 2 and 4: the signal found step 4 written"


def test_a_trial_of_one_batch_writes_nothing(tmp_path: Path) -> None:
    trainer(tmp_path, fast_dev_run=True, callbacks=[LastCheckpoint()], enable_checkpointing=True).fit(
        small_model(), small_data()
    )
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("arguments", [{"every_n_train_steps": 0}, {"every_minutes": 0.0}, {"every_minutes": -1.0}])
def test_intervals_that_are_none_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}={next(iter(arguments.values()))}"):
        LastCheckpoint(**arguments)
