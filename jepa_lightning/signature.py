"""What a checkpoint says of itself: whose it is, and in which format."""

from typing import Any

import torch
from lightning.pytorch import LightningModule

FORMAT_VERSION = 1
"""Format version of our checkpoints. A later one is refused; a file without a number is from before there was one."""


def class_name(cls: type) -> str:
    """Where a class is found, as a checkpoint notes it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def sign(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Note in a checkpoint whose it is, in which format, and with how many threads its sums were taken."""
    checkpoint["class"], checkpoint["format_version"] = class_name(type(module)), FORMAT_VERSION
    checkpoint["threads"] = torch.get_num_threads()
