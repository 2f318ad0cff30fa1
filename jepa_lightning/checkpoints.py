"""Reading checkpoints with clear errors, and writing them so that a kill or a full disk leaves the old one."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule

from jepa_lightning.jepa import JEPA

ModuleType = TypeVar("ModuleType", bound=LightningModule)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the destination, flush to the disk, then rename.

    Lightning's own writer goes through the system's temporary directory; where that is another file system, the last
    step is a copy, and a kill in the middle of it leaves half a file in the place of a good one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None) -> None:
        destination = Path(path)
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial = destination.with_name(destination.name + ".part")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(destination)
        finally:
            partial.unlink(missing_ok=True)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint's content, read without running any code in it (weights_only).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, damaged, or no Lightning checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {path}. Train first, or give the path of an existing .ckpt file.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is truncated, damaged or foreign ({reason})."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint or "hyper_parameters" not in checkpoint:
        raise ValueError(f"{path} is no checkpoint of this application: it has no state_dict with hyper_parameters.")
    return checkpoint


def load_jepa(path: str | os.PathLike[str]) -> JEPA:
    """The JEPA in a checkpoint, on the CPU, in evaluation mode.

    Args:
        path: Written by `jepa-lightning fit`, whichever family the model is of.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, or holds something other than a JEPA.
    """
    return _load(path, JEPA)  # type: ignore[type-abstract]


def load_probe(path: str | os.PathLike[str], kind: type[ModuleType]) -> ModuleType:
    """A fitted probe of the given class, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: There is no such file, or the JEPA that it was fitted on is gone.
        ValueError: The file cannot be read, or holds something else.
    """
    return _load(path, kind)


def _load(path: str | os.PathLike[str], kind: type[ModuleType]) -> ModuleType:
    name = read_checkpoint(path).get("class")
    # Only classes that are already imported: a file never chooses what to import.
    found = next((cls for cls in _family(kind) if cls.__name__ == name), None)
    if found is None:
        raise ValueError(f"{path} holds {name or 'a model of unknown class'}, not a {kind.__name__}.")
    try:
        return found.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()
    except (RuntimeError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not fit this version of {found.__name__}: {reason}") from error


def _family(kind: type[ModuleType]) -> list[type[ModuleType]]:
    """A class and everything derived from it."""
    return [kind, *(cls for child in kind.__subclasses__() for cls in _family(child))]
