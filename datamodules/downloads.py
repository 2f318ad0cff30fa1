"""Public data sets by name, as folders of images."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torchvision import datasets

from datamodules.new_folder import new_folder

DatasetName = Literal["cifar10", "stl10", "imagenette"]

# Name -> the data set's training split and its held-out split, downloaded into a folder.
SOURCES: dict[str, Callable[[str, bool], Any]] = {
    "cifar10": lambda root, train: datasets.CIFAR10(root, train=train, download=True),
    "stl10": lambda root, train: datasets.STL10(root, split="train" if train else "test", download=True),
    "imagenette": lambda root, train: datasets.Imagenette(root, split="train" if train else "val", download=True),
}


def download(name: DatasetName, root: Path) -> None:
    """Let torchvision download a data set, and write it as root/train/CLASS/* and root/val/CLASS/*.

    The folder appears when all is there; one that is there already is kept. See `new_folder` for what a killed run leaves:
    archives and images alike lie there until then. Images are written without loss (PNG),
    photographs that come as files are copied as they are. STL-10's unlabeled images are left out.

    Args:
        name: Name of the data set: "cifar10" (60,000 images of 32 pixels), "stl10" (13,000 of 96) or "imagenette" (13,394
            photographs).
        root: Folder to make.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in SOURCES:
        raise ValueError(f"data.download={name!r}: choose one of {', '.join(SOURCES)}.")
    if root.exists():
        return
    with new_folder(root) as folder:
        archive = folder.with_name("archive")
        for split, train in (("train", True), ("val", False)):
            print(f"Downloading {name}, {split} images, into {root} (by way of {folder.parent}) ...", flush=True)
            dataset = SOURCES[name](str(archive), train)
            classes = [name if isinstance(name, str) else name[0] for name in dataset.classes]
            for class_name in classes:
                (folder / split / class_name).mkdir(parents=True)
            for number in range(len(dataset)):
                _write(dataset, number, folder / split, classes)


def _write(dataset: Any, number: int, folder: Path, classes: list[str]) -> None:
    """One image: its own file where it has one, else pixels as PNG."""
    files = getattr(dataset, "_samples", None)  # Imagenette: (path, class)
    if files is not None:
        path, label = Path(files[number][0]), files[number][1]
        shutil.copyfile(path, folder / classes[label] / path.name)
        return
    image, label = dataset[number]
    image.save(folder / classes[label] / f"{number:06d}.png")
