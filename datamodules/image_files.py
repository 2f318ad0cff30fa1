"""Which images a folder holds, and which class each is of."""

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff"),
    *(".pbm", ".pgm", ".ppm", ".pnm"),
)
"""Endings of the files that are read, in small or capital letters."""

SYSTEM_FOLDERS = (b"@eaDir", b"__MACOSX", b"lost+found", b"$RECYCLE.BIN", b"System Volume Information")
"""Folders that operating and file systems put next to images, some with thumbnails in them; those whose names start with
a dot are passed over, too."""

_ENDINGS = tuple(ending.encode() for ending in EXTENSIONS)


class Samples(NamedTuple):
    """Files and their classes."""

    paths: np.ndarray
    """(N,) as bytes, in whichever encoding: a list of a million strings would be copied into every worker."""

    labels: Tensor
    """(N,), int64; -1 without classes."""


class Scan(NamedTuple):
    """What a folder holds."""

    samples: Samples
    """Its images, class by class, those of a class in the order of the bytes of their paths."""

    classes: list[str]
    """Names of the classes in the order of their bytes; none for a flat folder. Bytes that are no text in the file
    system's encoding are escaped as Python does it (surrogates)."""

    ignored: Counter[str]
    """Other files, by ending in small letters; "" for none."""

    num_loose: int
    """Number of files next to the class folders."""

    hidden: Counter[str]
    """Folders that were not read, by name: see `SYSTEM_FOLDERS`."""


class _Found(NamedTuple):
    """What lies below a folder: paths of images, other files by ending, and folders that were not read by name."""

    paths: list[bytes]
    others: Counter[str]
    hidden: Counter[str]


def scan(folder: Path, classes: list[str] | None = None) -> Scan:
    """Find the images of a folder: those of its sub-folders, a class each, at any depth, or else its own.

    Links are followed, also to folders. A folder that is reached twice within a class is read once, so that links may lead
    in circles.

    Args:
        folder: Folder to be read.
        classes: Names of the classes that must be there; whichever are there if left out.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: No image in it or in one of its classes, or other classes than expected.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: set data.root to the folder that holds the images.")
    root = os.fsencode(folder)
    with os.scandir(root) as entries:
        is_folder = {entry.name: _is_folder(entry) for entry in entries}
    folders = sorted(name for name in is_folder if is_folder[name])
    names = [name for name in folders if not _is_hidden(name)]
    if not names:
        found, ignored, hidden = _images(root)
        if not found:
            raise ValueError(f"{folder} holds no image: its files must end in {', '.join(EXTENSIONS)}.")
        if classes:
            raise ValueError(f"{folder} has no class folders, but the training images have: {', '.join(classes[:5])} ...")
        return Scan(Samples(np.array(found), torch.full((len(found),), -1)), [], ignored, 0, hidden)
    decoded = [os.fsdecode(name) for name in names]
    if classes is not None and decoded != classes:
        odd = [printable(name) for name in sorted(set(decoded) ^ set(classes))]
        raise ValueError(
            f"{folder} has not the classes of the training folder: {', '.join(odd[:5])}{' ...' if len(odd) > 5 else ''} "
            "is in one of the two alone."
        )
    paths: list[bytes] = []
    sizes: list[int] = []
    ignored, hidden = Counter[str](), Counter(printable(name) for name in folders if _is_hidden(name))
    for name in names:
        found, others, unread = _images(os.path.join(root, name), outside=root)
        if not found:
            raise ValueError(
                f"The class folder {printable(folder / os.fsdecode(name))} holds no image: fill it or remove it."
            )
        paths += found
        sizes.append(len(found))
        ignored += others
        hidden += unread
    labels = torch.arange(len(names)).repeat_interleave(torch.tensor(sizes))
    return Scan(Samples(np.array(paths), labels), decoded, ignored, len(is_folder) - len(folders), hidden)


def files_below(folder: Path) -> tuple[list[bytes], Counter[str]]:
    """Paths of all images below a folder, without classes, and how many other files there are by ending.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: No image in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    found = _images(os.fsencode(folder))
    if not found.paths:
        raise ValueError(f"{folder} holds no image: its files must end in {', '.join(EXTENSIONS)}.")
    return found.paths, found.others


def _images(folder: bytes, outside: bytes | None = None) -> _Found:
    """All images below a folder, in the order of the bytes of their paths, and what else there is.

    Args:
        folder: Folder to be read, with all that is below it.
        outside: Folder that is not read, wherever a link may lead.
    """
    found: list[bytes] = []
    others: list[bytes] = []
    hidden: list[bytes] = []
    seen = set() if outside is None else {_identity(outside)}
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        if _identity(current) in seen:
            continue
        seen.add(_identity(current))
        inner = []
        with os.scandir(current) as entries:
            for entry in entries:
                if _is_folder(entry):
                    if _is_hidden(entry.name):
                        hidden.append(entry.name)
                    else:
                        inner.append(entry.path)
                elif entry.name.lower().endswith(_ENDINGS):
                    found.append(entry.path)
                else:
                    others.append(entry.name)
        waiting += sorted(inner, reverse=True)  # which of two ways leads to a folder must not depend on the file system
    endings = Counter(printable(os.path.splitext(name)[1].lower()) for name in others)
    return _Found(sorted(found), endings, Counter(map(printable, hidden)))


def _is_hidden(name: bytes) -> bool:
    """Whether a folder is one of the system's, not of the images."""
    return name.startswith(b".") or name in SYSTEM_FOLDERS


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    """Whether an entry is a folder or a link to one; a link that leads nowhere, or to itself, is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _identity(folder: bytes) -> tuple[int, int]:
    """What is the same for all ways that lead to a folder."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def printable(name: str | bytes | Path) -> str:
    """A name for messages: bytes that are no text are shown as numbers, since not every stream can print them."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def describe(folder: Path, found: Scan) -> tuple[str, str]:
    """What was found, and what was left out ("" if nothing was), in a sentence each."""
    classes = f" in {len(found.classes)} class{'es' if len(found.classes) > 1 else ''}" if found.classes else ""
    holds = f"Found {len(found.samples.labels)} images{classes} in {printable(folder)}."
    left_out = []
    if found.ignored:
        left_out.append(f"files with other endings than {' '.join(EXTENSIONS)}: {_most_first(found.ignored)}")
    if found.num_loose:
        left_out.append(f"loose files next to class folders: {found.num_loose}")
    if found.hidden:
        left_out.append(f"hidden folders and those of the system: {_most_first(found.hidden)}")
    return holds, f"Left out of {printable(folder)}: {'; '.join(left_out)}." if left_out else ""


def _most_first(counted: Counter[str]) -> str:
    """Counts by name, in words."""
    ordered = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {name or 'without ending'}" for name, count in ordered)
