"""Folders that appear when they are complete."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(root: Path) -> Iterator[Path]:
    """Fill a folder that becomes `root` at the end of the block, all at once.

    Any number of processes and machines may make the same folder at the same time: each fills one of its own next to `root`,
    and the first that is ready gives its name. What is not used, also after an error or Ctrl-C, is removed, and nothing else
    is. Only a process that is killed leaves its own behind: ROOT.part-RANDOM, to be removed by hand.

    Args:
        root: Folder that should not be there yet; if another process has made it when the block ends, that one is kept.

    Yields:
        A new, empty folder on the same file system.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    workshop = Path(tempfile.mkdtemp(prefix=f"{root.name}.part-", dir=root.parent))
    try:
        folder = workshop / root.name  # the workshop itself is closed to other users, which its content should not be
        folder.mkdir()
        yield folder
        try:
            folder.rename(root)
        except OSError:
            if not root.is_dir():
                raise
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
