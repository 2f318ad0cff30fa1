"""Reading files of weights with clear errors, and writing them so that a kill or a full disk leaves the old one."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file


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


def read_file(path: Path) -> Any:
    """What torch.save or safetensors wrote, read without running any code in it.

    Raises:
        ValueError: The file is truncated, damaged or of another kind.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Mapped, where the format allows it: optimizer states that nobody reads stay on the disk.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (
        *(RuntimeError, OSError, EOFError, KeyError),
        *(pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError),
    ) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is truncated, damaged or foreign ({reason})."
        ) from error
