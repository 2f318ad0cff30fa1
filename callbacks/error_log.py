"""What is needed to find out why a run ended, kept in its directory."""

import platform
import sys
import traceback
from datetime import datetime
from pathlib import Path

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage


class ErrorLog(Callback):
    """Write error.log into the run directory when an error ends a run that had begun: the traceback and the environment.

    Before the first batch an error is a mistake of the user's, and its one sentence says enough. Each process writes a
    file of its own, error-1.log and so on.
    """

    def __init__(self) -> None:
        self._begun = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = self._begun or not trainer.sanity_checking

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = True

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not self._begun or not isinstance(exception, Exception):  # asked to end, by a signal or an exit
            return
        rank = trainer.global_rank
        path = Path(trainer.default_root_dir) / (f"error-{rank}.log" if rank else "error.log")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(describe(trainer, exception))
        except OSError as error:
            exception.add_note(f"(The traceback could not be written to {path}: {error.strerror}.)")
        else:
            exception.add_note(f"The traceback is in {path}.")


def describe(trainer: Trainer, exception: BaseException) -> str:
    """An exception with its traceback, and where it happened."""
    stage = trainer.state.stage or RunningStage.TRAINING
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    facts = {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "stage": f"{stage.value}, epoch {trainer.current_epoch}, optimizer step {trainer.global_step}",
        "process": f"{trainer.global_rank} of {trainer.world_size} on {platform.node()}",
        "precision": trainer.precision,
        "GPU": gpu,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.release()}",
        "versions": f"torch {torch.__version__}, lightning {lightning.__version__}",
    }
    lines = [f"{name}: {fact}" for name, fact in facts.items()]
    return "\n".join(lines) + "\n\n" + "".join(traceback.format_exception(exception))
