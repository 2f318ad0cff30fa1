"""Which files of a data set cannot be read, known to all processes of a run on a machine."""

import fcntl
import os
import tempfile
import weakref
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import numpy as np


class UnreadableFiles:
    """A flag for each file of a data set, shared by all workers, epochs, validations and ranks on a machine.

    So a bad file is decoded and named once, not once by each of them. The flags are a small file in the temporary folder
    that all of these processes map into their memory, whether they were forked or spawned. It goes with its owner; a run
    that was killed leaves one behind, named `unreadable-...`. (On several machines, each keeps its own.)

    Args:
        count: Number of files in the data set.
        token: Name of the flags, the same in all processes that share them; a new one if left out.
    """

    def __init__(self, count: int, token: str | None = None) -> None:
        self.count = max(1, count)  # a file of no bytes cannot be mapped
        self.path = Path(tempfile.gettempdir()) / f"unreadable-{token or uuid4().hex}"
        self._map()
        weakref.finalize(self, _remove, self.path, os.getpid())

    def _map(self) -> None:
        with self._open() as file:
            file.truncate(self.count)
            self._flags = np.memmap(file, np.uint8, "r+", shape=(self.count,))

    def _open(self) -> IO[bytes]:
        """The file of the flags: whoever comes first makes it, with nothing flagged, and nobody waits for another."""
        return os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")

    def __getstate__(self) -> dict[str, Any]:
        """What a spawned process needs to map the same flags."""
        return {"count": self.count, "path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def __contains__(self, index: int) -> bool:
        return bool(self._flags[index])

    def __len__(self) -> int:
        return int(np.count_nonzero(self._flags))

    def add(self, index: int) -> int | None:
        """Flag a file.

        Returns:
            How many are flagged now, or None if this one was already: exactly one process is given the number.
        """
        with self._open() as file:
            fcntl.lockf(file, fcntl.LOCK_EX)  # until the file is closed
            if index in self:
                return None
            self._flags[index] = 1
            return len(self)


def _remove(path: Path, owner: int) -> None:
    """Remove the flags, unless it is a forked worker that forgets its copy of them."""
    if os.getpid() == owner:
        path.unlink(missing_ok=True)
