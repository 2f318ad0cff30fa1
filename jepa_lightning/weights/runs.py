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
    inside = [Path(path).parent.parent] if Path(path).parent.name == LAST.parts[0] else []
    return next((directory for directory in (Path(path), *inside) if _configuration(directory)), None)


def _configuration(directory: Path) -> dict[str, Any]:
    """What a run has kept of its configuration; nothing where the file is not there, or somebody else's."""
    file = directory / "config.yaml"
    try:
        content = yaml.safe_load(file.read_text()) if file.is_file() else None
    except yaml.YAMLError:
        content = None
    return content if isinstance(content, dict) and "model" in content else {}


def data_of(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The data module of a run, {"class_path": ..., "init_args": ...}; None where the run has not kept it."""
    directory = run_directory(path)
    return None if directory is None else _configuration(directory).get("data")
