"""Which images of a folder are asked for: those to train on and to hold out, a fraction, a list, or all."""

import os
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from datamodules.image_files import Samples, Scan, printable
from datamodules.rng import HELD_OUT_STREAM, SPLIT_STREAM, SUBSET_STREAM, seeded_generator


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


def training_folder(root: Path) -> Path:
    """Where the images to train on lie: root/train, or root where there is no such folder."""
    return root / "train" if (root / "train").is_dir() else root


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
