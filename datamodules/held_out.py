"""Loaders of held-out images: each once, in order, and none in the place of one that cannot be read."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from datamodules.resumable import SingleLoaderDataModule, already_collated


class HeldOutLoader(DataLoader[Any]):
    """A DataLoader over held-out images that leaves out a batch of which not one image can be read.

    No other image takes the place of an unreadable one: it would count twice.

    Raises:
        ValueError: While it is iterated over: all batches were left out.
    """

    may_be_empty = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        empty = True
        for batch in super().__iter__():
            if batch is not None:
                empty = False
                yield batch
        if empty and not self.may_be_empty:
            raise ValueError(
                f"Not one of the {len(self.sampler)} held-out images of this process can be decoded: "  # type: ignore[arg-type]
                "repair the files that the warnings name, or choose another data.root."
            )


def held_out_loader(data: SingleLoaderDataModule, split: str, images: Dataset[Any]) -> HeldOutLoader:
    """The loader of a process's share of held-out images.

    Args:
        data: Data module whose settings it takes.
        split: Name of the images, for messages.
        images: Data set with a `__getitems__` that returns a batch, or None if not one of its images can be read.

    Raises:
        ValueError: Fewer images than processes.
    """
    return HeldOutLoader(
        images,
        batch_size=data.batch_size,
        sampler=data.held_out_sampler(split, images),
        collate_fn=already_collated,
        **data.loader_settings(),
    )
