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

ProbeType = TypeVar("ProbeType", bound=LightningModule)


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
    except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as a checkpoint: it is truncated, damaged or foreign ({reason}).") from error
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
    checkpoint = read_checkpoint(path)
    kind = checkpoint["hyper_parameters"].get("_class_path")
    if not any(name.startswith("target_encoder.") for name in checkpoint["state_dict"]):
        raise ValueError(
            f"{path} holds {kind or 'a model'} without a target encoder, not a JEPA. Give the checkpoint of the first "
            "phase (fit of a JEPA), not that of a probe."
        )
    try:
        model = JEPA.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except (RuntimeError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} does not fit this version of {kind or 'its model'}: {reason}") from error
    return model.eval()


def load_probe(path: str | os.PathLike[str], kind: type[ProbeType]) -> ProbeType:
    """A fitted probe of the given class, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: There is no such file, or the JEPA that it was fitted on is gone.
        ValueError: The file cannot be read, or holds something else.
    """
    found = read_checkpoint(path)["hyper_parameters"].get("_class_path", "a model of unknown class")
    if found.rsplit(".", 1)[-1] != kind.__name__:
        raise ValueError(f"{path} holds {found}, not a {kind.__name__}.")
    return kind.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()
