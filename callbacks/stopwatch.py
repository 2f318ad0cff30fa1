"""How long a run has trained, over all its resumes."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Stopwatch(Callback):
    """Keep the seconds of training in every checkpoint, so that a report can say what its figures cost."""

    def __init__(self) -> None:
        self._before = 0.0
        self._began = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._before + time.monotonic() - self._began}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict["seconds"]
