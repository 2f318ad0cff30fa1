"""Reading files of weights with clear errors, and writing them so that a kill or a full disk leaves the old one."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol, get_filesystem
from safetensors import SafetensorError
from safetensors.torch import load_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write next to the destination, flush to the disk, then rename.

    Lightning's own writer makes the whole file in memory first, and goes through the system's temporary directory; where
    that is another file system, the last step is a copy, and a kill in the middle of it leaves half a file in the place of
    a good one. URLs are left to it: what it writes there appears when it is complete.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None) -> None:
        if not _is_local_file_protocol(str(path)):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        destination = Path(path)
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial = destination.with_name(destination.name + ".part")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(destination)
        except RuntimeError as error:  # torch's writer says so when its file could not take all
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise
        finally:
            partial.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """What was saved. A file of this machine is mapped, not read: each process takes what it needs.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is truncated, damaged or of another kind.
        """
        if not _is_local_file_protocol(str(path)):
            return super().load_checkpoint(path, map_location or "cpu", weights_only=True)
        if not Path(path).is_file():
            raise FileNotFoundError(f"No checkpoint at {path}.")
        return read_file(Path(path))


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
        raise ValueError(unreadable(path, error)) from error


def read_url(url: str) -> Any:
    """What torch.save wrote to a URL that fsspec can open, read without running any code in it.

    Raises:
        FileNotFoundError: There is nothing.
        ValueError: It is truncated, damaged or of another kind.
    """
    if not get_filesystem(url).exists(url):
        raise FileNotFoundError(f"No checkpoint at {url}.")
    try:
        with get_filesystem(url).open(url, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(unreadable(url, error)) from error


def unreadable(path: str | os.PathLike[str], error: Exception) -> str:
    """One sentence about a file that is no checkpoint."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return f"{path} cannot be read as a checkpoint: it is truncated, damaged or foreign ({reason})."
