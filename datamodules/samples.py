"""Which pictures a folder holds, which class each is of, which part of them is asked for, and what is in a file."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import find_classes
from torchvision.transforms.v2 import functional as vision

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif")


class Samples(NamedTuple):
    """Files and their classes."""

    paths: np.ndarray
    """(N,) as bytes: a list of a million strings would be copied into every worker."""

    labels: Tensor
    """(N,), int64; -1 without classes."""


def scan(folder: Path, classes: list[str] | None = None) -> tuple[Samples, list[str]]:
    """The pictures of a folder, in sorted order: those of its sub-folders, a class each, or else its own.

    Args:
        folder: To be read.
        classes: Those that must be there, by name; whatever is there if left out.

    Returns:
        The samples and the names of the classes, none for a flat folder.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: No picture in it or in one of its classes, or other classes than expected.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: set data.root to the folder that holds the pictures.")
    if not any(entry.is_dir() for entry in folder.iterdir()):
        found = _pictures(folder)
        if not found:
            raise ValueError(f"{folder} holds no picture: its files must end in {', '.join(EXTENSIONS)}.")
        if classes:
            raise ValueError(f"{folder} has no class folders, but the training pictures have: {', '.join(classes[:5])} ...")
        return Samples(np.array(found), torch.full((len(found),), -1)), []
    names, _ = find_classes(str(folder))
    if classes is not None and names != classes:
        odd = sorted(set(names) ^ set(classes))
        raise ValueError(
            f"{folder} has not the classes of the training folder: {', '.join(odd[:5])}{' ...' if len(odd) > 5 else ''} "
            "is in one of the two alone."
        )
    paths: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = _pictures(folder / name)
        if not found:
            raise ValueError(f"The class folder {folder / name} holds no picture: fill it or remove it.")
        paths += found
        labels += [label] * len(found)
    return Samples(np.array(paths), torch.tensor(labels)), names


def _pictures(folder: Path) -> list[bytes]:
    return sorted(str(path).encode() for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)


def read_list(file: Path, root: Path, classes: list[str]) -> Samples:
    """The pictures that a text file names, one path relative to `root` a line; the first folder of a path is its class.

    Raises:
        FileNotFoundError: No such file, or one of the pictures is missing.
        ValueError: The file names no picture, or one outside of the classes.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There is no list {file}: data.file_list names a text file, one picture a line.")
    lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"The list {file} is empty: write one path a line, relative to {root}.")
    missing = [line for line in lines if not (root / line).is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(lines)} pictures of {file} are not in {root}, first {missing[0]}.")
    numbers = {name: number for number, name in enumerate(classes)}
    foreign = [line for line in lines if classes and Path(line).parts[0] not in numbers]
    if foreign:
        raise ValueError(f"{file} names {foreign[0]}, which lies in none of the classes {', '.join(classes[:5])} ...")
    labels = [numbers[Path(line).parts[0]] if classes else -1 for line in lines]
    return Samples(np.array([str(root / line).encode() for line in lines]), torch.tensor(labels))


def draw_per_class(labels: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """A random part of each class, at least one picture of each: a mask (N,), bool."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        count = max(1, round(fraction * len(members)))
        chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return chosen


def part_of(samples: Samples, chosen: Tensor) -> Samples:
    """Those samples at which a mask (N,) is true."""
    return Samples(samples.paths[chosen.numpy()], samples.labels[chosen])


def read_picture(path: str) -> Tensor:
    """A picture in RGB, the right way up: uint8 (3, H, W).

    Raises:
        OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError: It cannot be decoded.
    """
    with Image.open(path) as image:
        if image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            # Nearly all pictures of nearly all data sets, and a fifth faster than by Pillow: the same decoder, fewer copies.
            try:
                return torch.from_numpy(simplejpeg.decode_jpeg(Path(path).read_bytes(), "RGB")).permute(2, 0, 1)
            except ValueError:
                pass  # Pillow reads some that break the rules, and says what is wrong with the others
        if image.mode.startswith("I;16"):  # Pillow would clip 16 bits, not scale them
            return vision.pil_to_tensor(image.point(lambda value: value * (1 / 256)).convert("L").convert("RGB"))
        ImageOps.exif_transpose(image, in_place=True)
        return vision.pil_to_tensor(image.convert("RGB"))
