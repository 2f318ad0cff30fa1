"""Run directories: which checkpoint is meant by one, and what its model was trained on."""

import os
from pathlib import Path
from typing import Any

import yaml

from callbacks.checkpointing import is_local

LAST = Path("checkpoints", "last.ckpt")


def checkpoint_of(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The last checkpoint of a run directory; any other path as it is."""
    if is_local(path) and (Path(path) / LAST).exists():
        return Path(path) / LAST
    return path


def run_directory(path: str | os.PathLike[str]) -> Path | None:
    """The directory of the run that a path belongs to, by its config.yaml; None if there is none.

    Args:
        path: A run directory, or a file in its folder checkpoints.
    """
    if not is_local(path):
        return None
    for directory in (Path(path), Path(path).parent.parent):
        if (directory / "config.yaml").is_file():
            return directory
    return None


def data_of(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The data module of a run, {"class_path": ..., "init_args": ...}; None where the run has not kept it."""
    directory = run_directory(path)
    if directory is None:
        return None
    return yaml.safe_load((directory / "config.yaml").read_text()).get("data")
