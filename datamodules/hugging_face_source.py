"""What Hugging Face's `datasets` reads, row by row or as a stream of records."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.image_files import Samples
from datamodules.image_stream import Record

SHARDS = 64
"""Shards that a data set of `save_to_disk` is streamed in, for processes to share."""

LABELS = ("label", "labels", "cls", "fine_label")
"""Columns that hold classes, where none is named; the first that is there."""


class HuggingFaceSource:
    """A data set by its name or files: see `datamodules.HuggingFaceImages` for the arguments."""

    def __init__(
        self,
        path: str,
        name: str | None,
        data_files: dict[str, str] | None,
        image_column: str | None,
        label_column: str | None,
        streaming: bool,
    ) -> None:
        self.path, self.name, self.data_files, self.streaming = path, name, data_files, streaming
        self.image_column, self.label_column = image_column, label_column
        self._splits: dict[str, Any] = {}
        self._alone: str | None = None  # split that a data set without splits is taken for

    def split(self, split: str) -> Any:
        """A split, with images as they lie in their files.

        Raises:
            ValueError: A column that is not there, or none of images.
        """
        if split not in self._splits:
            datasets = library()
            if (Path(self.path) / "dataset_dict.json").is_file() or (Path(self.path) / "state.json").is_file():
                opened = self._of_disk(datasets.load_from_disk(self.path), split)
                opened = opened.to_iterable_dataset(min(SHARDS, len(opened))) if self.streaming else opened
            else:
                files, streaming = self.data_files, self.streaming
                opened = datasets.load_dataset(self.path, self.name, data_files=files, split=split, streaming=streaming)
            features = dict(opened.features or {})
            images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
            column = self.image_column or next(iter(images), None)
            for argument, asked in (("image_column", column), ("label_column", self.label_column)):
                if (asked is None and argument == "image_column") or (asked and asked not in features):
                    raise ValueError(f"data.{argument}={asked!r}: {self.path} has the columns {', '.join(features)}.")
            if self.label_column and not _is_of_classes(kind := features[self.label_column]):
                raise ValueError(
                    f"data.label_column={self.label_column!r} of {self.path} is of {kind}, and classes are integers or "
                    "text: name another column, or none by data.label_column=''."
                )
            self.image_column = column
            label, _ = self.labels_of(opened)
            if self.streaming and label is not None and getattr(features[label], "dtype", "") in ("string", "large_string"):
                raise ValueError(
                    f"data.label_column={label!r} of {self.path} is text, and a stream does not say which classes there "
                    "are: leave data.streaming off, write integers, or train without classes by data.label_column=''."
                )
            kept = opened.select_columns([column] + ([label] if label else []))  # or else the others are read, too
            self._splits[split] = kept.cast_column(column, datasets.Image(decode=False))
        return self._splits[split]

    def _of_disk(self, found: Any, split: str) -> Any:
        """A split of what `save_to_disk` has written: of several, or a data set without splits, which can be but one."""
        if isinstance(found, dict):
            if split not in found:
                raise ValueError(f"{self.path} has no split {split!r}: choose one of {', '.join(found)}.")
            return found[split]
        if self._alone not in (None, split):
            raise ValueError(
                f"{self.path} is one data set without splits, and cannot be {self._alone!r} and {split!r}: leave "
                "data.val_split out, and data.val_fraction of it is held out."
            )
        self._alone = split
        return found

    def labels_of(self, opened: Any) -> tuple[str | None, list[str]]:
        """The column of the classes of a split, if there is one, and their names, if it says them."""
        column = self.label_column
        if column is None:
            column = next((name for name in LABELS if name in opened.features and _is_of_classes(opened.features[name])), "")
        return column or None, list(getattr(opened.features[column], "names", None) or []) if column else []

    def rows(self, split: str, known: list[str] | None = None) -> tuple[Samples, list[str]]:
        """All rows of a split, by names such as b"train/17", and the names of the classes.

        Args:
            split: Name of the split.
            known: Names of the classes, where another split has said them.

        Raises:
            ValueError: It is empty, or has classes that are not known.
        """
        opened = self.split(split)
        if not len(opened):
            raise ValueError(f"{self.path} has no images in split {split!r}.")
        column, classes = self.labels_of(opened)
        labels = torch.full((len(opened),), -1)
        if column is not None:
            values = opened.select_columns([column]).with_format("arrow")[:][column]
            present = ~np.asarray(values.is_null())
            if np.issubdtype(np.asarray(values.drop_null()).dtype, np.signedinteger):
                present &= np.asarray(values.fill_null(-1)) != -1  # as the Hub has it where labels are withheld
            values = np.asarray(values.filter(present))
            if not classes:
                found, values = np.unique(values, return_inverse=True)
                classes = known or [str(value) for value in found]
                if odd := [str(value) for value in found if str(value) not in classes]:
                    raise ValueError(
                        f"{self.path}: split {split!r} has the class {odd[0]!r}, and the training images have "
                        f"{', '.join(classes)}."
                    )
                values = np.array([classes.index(str(value)) for value in found])[values]
            labels[torch.from_numpy(present)] = torch.from_numpy(values.astype(np.int64))
        return Samples(np.array([f"{split}/{row}".encode() for row in range(len(opened))]), labels), classes

    def fetch(self, path: bytes) -> io.BytesIO | str:
        """The content of a row's image by its name, or the path of its file."""
        split, row = path.decode().rsplit("/", 1)
        image = self.split(split)[int(row)][self.image_column]
        if image is None:
            raise ValueError("there is no image")
        return image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])

    def records(
        self, split: str, rank: tuple[int, int] = (0, 1), shuffle: tuple[int, int] | None = None, epoch: int = 0
    ) -> Iterator[Record]:
        """A process's share of a stream.

        Args:
            split: Name of the split.
            rank: Rank of the process, and number of processes.
            shuffle: Seed, and number of images that the next one is drawn from; in order by default.
            epoch: Another order for each.
        """
        opened = self.split(split)
        column, _ = self.labels_of(opened)
        if shuffle is not None:
            opened = opened.shuffle(seed=shuffle[0], buffer_size=shuffle[1])
        opened = library().distributed.split_dataset_by_node(opened, *rank)
        opened.set_epoch(epoch)
        for place, row in enumerate(opened):
            image = row[self.image_column] or {"bytes": None, "path": None}
            content = image["path"] if image["bytes"] is None else image["bytes"]
            label = -1 if column is None or row[column] is None else int(row[column])
            yield Record(content, label, image["path"] or f"{split}, image {place} of process {rank[0]}")


def _is_of_classes(feature: Any) -> bool:
    """Whether a column holds what can be classes: integers, truth values or text."""
    return str(getattr(feature, "dtype", "")).startswith(("int", "uint", "bool", "string", "large_string"))


def library() -> Any:
    """Hugging Face's datasets.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    try:
        import datasets
        import datasets.distributed
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'HuggingFaceImages needs the package datasets: pip install "jepa-lightning[hf]".', name="datasets"
        ) from error
    return datasets
