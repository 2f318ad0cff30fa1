"""A run's progress in plain lines, for logs in which no progress bar can be seen."""

import sys
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.schedules import total_optimizer_steps


class ProgressLines(Callback):
    """Print a line now and then where standard output is no terminal: under nohup, in the log of a batch job.

    Lightning's progress bar shows nothing there.

    Args:
        every_seconds: Seconds between two lines of training, >= 0. Each validation has a line of its own.

    Raises:
        ValueError: `every_seconds` below 0.
    """

    def __init__(self, every_seconds: float = 60.0) -> None:
        if not every_seconds >= 0:
            raise ValueError(f"ProgressLines: every_seconds={every_seconds} must be >= 0.")
        self.every_seconds = every_seconds
        self._first_step = 0
        self._last_line = 0.0
        self._paced_from: float | None = None  # the end of the first step, in which networks are compiled

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step, self._paced_from = trainer.global_step, None
        self._last_line = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        now = time.monotonic()
        done = trainer.global_step - self._first_step
        if done and self._paced_from is None:
            self._paced_from = now
        if now - self._last_line < self.every_seconds or not done:
            return
        self._last_line = now
        total = total_optimizer_steps(trainer)
        text = f"epoch {trainer.current_epoch}, optimizer step {trainer.global_step} of {total}"
        if done > 1 and self._paced_from is not None:
            seconds = (now - self._paced_from) / (done - 1)
            text += f", {seconds:.3g} s a step, {timedelta(seconds=round(seconds * (total - trainer.global_step)))} left"
        self._print(trainer, text)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._print(trainer, f"validated after optimizer step {trainer.global_step}")

    def _print(self, trainer: Trainer, text: str) -> None:
        """One line, with what the progress bar would show behind it."""
        if trainer.is_global_zero and not sys.stdout.isatty():
            figures = [f"{name} {value:.4g}" for name, value in trainer.progress_bar_metrics.items()]
            print(": ".join([text, ", ".join(figures)]) if figures else text, flush=True)
