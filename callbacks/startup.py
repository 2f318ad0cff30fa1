"""What a run is, in a few lines, before it begins."""

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

NOISE = (
    *("GPU available:", "TPU available:", "HPU available:", "💡 Tip:", "Loading `train_dataloader` to estimate"),
    *("`Trainer(limit_", "Restoring states from", "Restored all states from", "Loaded model weights from"),
)
"""Beginnings of what Lightning says at each start; the summary says what matters of it."""


class StartUp(Callback):
    """Say what is trained, on what and where it is written: the model's size, the device, the run directory, TensorBoard.

    (What was found in a folder of images, and left out, is said when it is read.)
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for line in describe(trainer, pl_module):
            rank_zero_info(line)


def describe(trainer: Trainer, module: LightningModule) -> list[str]:
    """The lines of the summary."""
    sizes = {name: sum(p.numel() for p in child.parameters()) for name, child in module.named_children()}
    parts = ", ".join(f"{name} {readable(size)}" for name, size in sizes.items() if size)
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    device: Any = trainer.strategy.root_device.type
    if device == "cuda":
        device = torch.cuda.get_device_name()
    elif device == "cpu":
        device = f"CPU ({torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''})"
    where = f"Written to {trainer.default_root_dir}"
    if trainer.global_step:
        where += f", going on at optimizer step {trainer.global_step}"
    lines = [
        f"{type(module).__name__}: {readable(trained)} trained parameters ({parts}).",
        f"{trainer.world_size} x {device}, precision {trainer.precision}, {trainer.max_epochs} epochs of "
        f"{trainer.num_training_batches} batches.",
        f"{where}.",
    ]
    if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
        lines.append(f"Look at it with: tensorboard --logdir {trainer.default_root_dir}")
    return lines


def readable(count: int) -> str:
    """A number of parameters: 5.4 M."""
    for size, unit in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


class _Quiet(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(NOISE)


def quiet() -> None:
    """Leave out what Lightning says at each start."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if not any(isinstance(present, _Quiet) for present in logger.filters):
        logger.addFilter(_Quiet())
