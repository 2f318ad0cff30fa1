"""Which images a folder holds, which class each is of, and which of them are asked for."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from datamodules.rng import HELD_OUT_STREAM, SPLIT_STREAM, SUBSET_STREAM, seeded_generator

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


def all_images(root: Path, read: Callable[[Path], Scan]) -> tuple[dict[str, Samples], list[str], str]:
    """All images below a folder, in the order of their paths, those of root/train before those of root/val.

    Args:
        root: Folder of the images.
        read: `scan`, or what also says what it found.

    Returns:
        {"predict": samples}, the names of the classes, and a token for their flags of unreadable files.
    """
    folders = [root / name for name in ("train", "val") if (root / name).is_dir()]
    found = [read(folder) for folder in folders or [root]]
    classes = sorted({name for part in found for name in part.classes}, key=os.fsencode)
    labels = []
    for part in found:
        places = torch.tensor([classes.index(name) for name in part.classes], dtype=torch.int64)
        labels.append(places[part.samples.labels] if part.classes else part.samples.labels)
    samples = Samples(np.concatenate([part.samples.paths for part in found]), torch.cat(labels))
    return {"predict": samples}, classes, uuid4().hex


def split_images(
    root: Path, val_fraction: float, fraction: float, file_list: Path | None, seed: int, read: Callable[..., Scan]
) -> tuple[dict[str, Samples], list[str], int]:
    """The images to train on and to hold out: see `datamodules.ImageFolder` for the folders and the arguments.

    Args:
        root: Folder of the images.
        val_fraction: Fraction of each class that is held out where there is no folder val.
        fraction: Fraction of each class that is trained on.
        file_list: Text file that names the training images.
        seed: Seed of the split and the fraction.
        read: `scan`, or what also says what it found.

    Returns:
        {"train": samples, "val": samples}, the names of the classes, and how many classes have no image to hold out.

    Raises:
        ValueError: No image can be held out.
    """
    split = (root / "val").is_dir()
    folder = training_folder(root)
    everything = read(folder)
    train, classes, alone = everything.samples, everything.classes, 0
    if split:
        val = read(root / "val", classes or None).samples
    else:
        held_out = draw_per_class(train.labels, val_fraction, seeded_generator(seed, SPLIT_STREAM), spare=1)
        if not held_out.any():
            raise ValueError(f"{folder} has too few images to hold out {val_fraction:.0%} of each class.")
        val, train = part_of(train, held_out), part_of(train, ~held_out)
        alone = len(classes) - len(val.labels.unique()) if classes else 0
    if file_list is not None:
        train = read_list(file_list, folder, everything.samples)
        if not split:
            val = part_of(val, torch.from_numpy(~np.isin(val.paths, train.paths)))
    if fraction < 1:
        train = part_of(train, draw_per_class(train.labels, fraction, seeded_generator(seed, SUBSET_STREAM)))
    # In one mixed order, so that the first batches of a validation have all classes.
    order = torch.randperm(len(val.labels), generator=seeded_generator(seed, HELD_OUT_STREAM))
    return {"train": train, "val": Samples(val.paths[order.numpy()], val.labels[order])}, classes, alone


def training_folder(root: Path) -> Path:
    """Where the images to train on lie: root/train, or root where there is no such folder."""
    return root / "train" if (root / "train").is_dir() else root


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


def read_list(file: Path, folder: Path, samples: Samples) -> Samples:
    """Those of the images of a folder that a text file names, one path relative to the folder a line, in its order.

    Args:
        file: Text file in the encoding of the file system, whichever that is.
        folder: Folder that the paths are relative to.
        samples: All images of that folder, as `scan` finds them.

    Raises:
        FileNotFoundError: No such file, or one of the images is missing.
        ValueError: The file names no image, or one outside of the folder.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There is no list {file}: data.file_list names a text file, one image a line.")
    lines = [os.path.normpath(line.strip()) for line in file.read_bytes().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"The list {file} is empty: write one path a line, relative to {folder}.")
    outside = [line for line in lines if os.path.isabs(line) or line.split(os.sep.encode(), 1)[0] == b".."]
    if outside:
        raise ValueError(f"{file} names {printable(outside[0])}, outside of {folder}: write paths relative to that folder.")
    start = len(os.path.join(os.fsencode(folder), b""))
    places = {path[start:]: place for place, path in enumerate(samples.paths.tolist())}
    missing = [line for line in lines if line not in places]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(lines)} images of {file} are not among those of {folder}, "
            f"first {printable(missing[0])}."
        )
    chosen = [places[line] for line in lines]
    return Samples(samples.paths[chosen], samples.labels[chosen])


def draw_per_class(labels: Tensor, fraction: float, generator: torch.Generator, spare: int = 0) -> Tensor:
    """A random fraction of each class, at least one image of each.

    Args:
        labels: Class indices (N,), int64.
        fraction: Fraction of each class that is drawn, in (0, 1].
        generator: CPU generator from which all randomness comes.
        spare: Minimum number of images of each class that are not drawn; a class of as many is left alone.

    Returns:
        A mask (N,), bool.
    """
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]  # class by class, each in a random order
    _, sizes = labels.unique(return_counts=True)
    wanted = (fraction * sizes.double()).round().long().clamp(min=1)
    wanted = torch.minimum(wanted, (sizes - spare).clamp(min=0))
    rank_in_class = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[order] = rank_in_class < wanted.repeat_interleave(sizes)
    return chosen


def part_of(samples: Samples, chosen: Tensor) -> Samples:
    """Those samples at which a mask (N,) is true."""
    return Samples(samples.paths[chosen.numpy()], samples.labels[chosen])
