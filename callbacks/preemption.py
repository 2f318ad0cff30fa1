"""Runs that are asked to end: finish the step, save, and say by the exit code what happened."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.agreement import Agreement
from callbacks.checkpointing import LastCheckpoint, checkpoint_folder, next_hpc_checkpoint, remove


class Interrupted(SystemExit):
    """The run was ended by a signal; its exit code is 128 plus the signal's number, as a shell would report it.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class Preemption(Checkpoint):
    """Answer SIGTERM, SIGUSR1 and Ctrl-C: finish the optimizer step, save, exit with 143, 138 or 130.

    A signal's handler only takes note. At the end of the batch all processes agree that one of them was asked to end, and
    save last.ckpt, or, under SLURM with requeueing and its requeue signal (SIGUSR1 unless the SLURMEnvironment says
    otherwise), an hpc checkpoint, from which the same command goes on when the job has been requeued. The exit code is
    never 0, so that a chain of commands stops. With a single process, a validation is left at its next batch; several
    finish it, since they may be at different batches of it. What ends before training has begun, or outside of it, ends at
    once. A second Ctrl-C ends without saving.
    """

    def __init__(self) -> None:
        self._received = 0
        self._training = False

    def _install(self, trainer: Trainer) -> None:
        """Take the signals from Lightning, which gives them back to their owners at the end of a run."""
        self._requeue_signal = requeue_signal(trainer)
        if threading.current_thread() is threading.main_thread():  # elsewhere no handlers can be set
            for number in {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, self._requeue_signal or signal.SIGUSR1}:
                signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self._training or (number == signal.SIGINT and self._received == signal.SIGINT):
            raise Interrupted(number)
        self._received = self._received or number
        hint = ", Ctrl-C again ends without saving" if number == signal.SIGINT else ""
        text = f"\n{signal.Signals(number).name}: ending after this step, and saving{hint}.\n"
        os.write(2, text.encode())  # unlike print, safe in the middle of another print

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install(trainer)
        self._agree = Agreement(trainer)
        self._received, self._training = 0, True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._install(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if number := self._agree(self._received):
            self._end(trainer, number)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._received and self._agree.alone and trainer.state.fn == TrainerFn.FITTING:
            self._end(trainer, self._received)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._received and self._agree.alone:
            self._end(trainer, self._received)

    def _end(self, trainer: Trainer, number: int) -> None:
        """Save, have the job requeued if it was the signal for that, and leave."""
        if trainer.fast_dev_run:
            raise Interrupted(number)
        if number == self._requeue_signal:
            path = next_hpc_checkpoint(trainer.default_root_dir)
            trainer.save_checkpoint(path)
            if trainer.is_global_zero:
                for older in set(Path(path).parent.glob("hpc_ckpt_*.ckpt")) - {Path(path)}:
                    remove(older)
            if trainer.global_step >= trainer.estimated_stepping_batches:
                save_last(trainer)  # the job that goes on has no step left, and writes no end of its training
            if trainer.is_global_zero:
                requeue()
        else:
            path = save_last(trainer)
        if trainer.is_global_zero:
            name = signal.Signals(number).name
            print(f"{name}: saved {path} at optimizer step {trainer.global_step}; go on with --ckpt_path last.", flush=True)
        raise Interrupted(number)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._training = False


def save_last(trainer: Trainer) -> str:
    """Write last.ckpt, by the run's own callback if it has one, and return its path."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, LastCheckpoint):
            return callback.save(trainer, must=True)
    path = os.path.join(checkpoint_folder(trainer.default_root_dir), "last.ckpt")
    trainer.save_checkpoint(path)
    return path


def requeue_signal(trainer: Trainer) -> int | None:
    """The signal by which SLURM announces that the job should be requeued; None outside of it."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal or signal.SIGUSR1
    return None


def requeue() -> None:
    """Ask SLURM to start this job again."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"scontrol requeue {job} failed: {done.stderr.strip()}. Start the job again by hand.", file=sys.stderr)
