"""Images that come one after the other, from shards too many for a disk: read by each process, decoded by its workers.

The training process reads the stream and hands the bytes of each batch to its workers. So the order does not depend on their
number, and a run that was cut goes on at the same image: what lies before is read again, and not decoded.
"""

import io
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import fsspec
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.batches import ImageBatch, ViewBatch
from datamodules.decoding import read_image
from datamodules.image_datasets import ImageDataset, UnreadableImageWarning, batch_of_views
from datamodules.image_files import Samples, printable
from datamodules.pixel_format import PixelFormat
from datamodules.preprocessing import center
from datamodules.resumable import already_collated
from datamodules.rng import CROP_STREAM, HELD_OUT_STREAM, VIEW_STREAM
from datamodules.unreadable import UnreadableFiles
from datamodules.views import Place, ViewMaker


class Record(NamedTuple):
    """An image of a stream, not yet decoded."""

    content: bytes | str | None
    """What its file holds, or the path of that; None where there is no image."""

    label: int
    """Class index; -1 without."""

    name: str
    """For messages."""


class StreamBatches:
    """Batch sampler over a stream: lists of (epoch, place in the process's epoch, record).

    Args:
        open_stream: Opens the process's share of the stream, given the number of the epoch.
        batch_size: Images per batch and process.
        length: Batches of an epoch; None to read the stream to its end, with a last batch that may be smaller.
        repeat: Whether every epoch is the first one again.
        unequal: Whether a share that ends before the epoch does begins anew, since those of other processes may be larger.
    """

    def __init__(
        self,
        open_stream: Callable[..., Iterator[Record]],
        batch_size: int,
        length: int | None,
        repeat: bool = False,
        unequal: bool = False,
    ) -> None:
        self.open_stream, self.batch_size, self.length, self.repeat = open_stream, batch_size, length, repeat
        self.unequal = unequal
        self.epoch = 0
        self.first_batch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        self.epoch = 0 if self.repeat else epoch

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("a stream has no length")
        return self.length

    def __iter__(self) -> Iterator[list[tuple[int, int, Record]]]:
        """Yield the batches of an epoch from `first_batch` on.

        Raises:
            ValueError: The stream ends before the epoch does, or has no image.
        """
        batch: list[tuple[int, int, Record]] = []
        place = -1
        for place, record in enumerate(self._records()):
            if place // self.batch_size >= (self.length or place + 1):
                return
            if place >= self.first_batch * self.batch_size:
                batch.append((self.epoch, place, record))
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if self.length is None and batch:
            yield batch
        elif self.length is not None and place + 1 < self.length * self.batch_size:
            raise ValueError(
                f"The stream of this process ended after {place + 1} images, and data.size promised "
                f"{self.length * self.batch_size} of its own: lower data.size, or make the shards alike."
            )

    def _records(self) -> Iterator[Record]:
        """The share of the process, again and again if it is `unequal`: the other processes wait for each of its steps."""
        count = 0
        for record in self.open_stream(epoch=self.epoch):
            count += 1
            yield record
        if self.length is None or not self.unequal or not count or count >= self.length * self.batch_size:
            return
        warnings.warn(
            f"The share of the stream of this process ended after {count} of {self.length * self.batch_size} images, and "
            "begins anew, so that some images come twice, and some of other processes perhaps not at all. Shards of equally "
            "many images are shared exactly; a smaller data.size avoids it, too.",
            stacklevel=2,
        )
        while True:
            yield from self.open_stream(epoch=self.epoch)


class StreamedImages(ImageDataset):
    """Decodes what `StreamBatches` hands out.

    Args:
        image_size: Height H and width W in pixels.
        seed: Seed of the random changes, which are functions of (seed, epoch, rank, place in the epoch).
        rank: Rank of the process.
        change: Random change of a training image, (C, any, any) -> an image or a pair of views; None to cut the middle.
        pixels: How the images are read.
        maker: Maker of pairs of views of held-out images, which are functions of (seed, rank, place); none by default.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        seed: int,
        rank: int,
        change: Callable[[Tensor], Any] | None,
        pixels: PixelFormat,
        maker: ViewMaker | None = None,
    ) -> None:
        nothing = Samples(torch.empty(0).numpy(), torch.empty(0, dtype=torch.int64))
        super().__init__(nothing, image_size, seed, UnreadableFiles(1), pixels)
        self.rank, self.change, self.maker = rank, change, maker
        self._named: set[str] = set()

    def __getitems__(self, items: list[tuple[int, int, Record]]) -> ImageBatch | ViewBatch | None:
        """The batch of these records. In training the next readable one of the batch stands in for an unreadable one.

        Raises:
            ValueError: Not one image of a training batch can be read.
        """
        decoded = [self._decode(record) for _, _, record in items]
        labels = torch.tensor([record.label for _, _, record in items])
        kept = [place for place, image in enumerate(decoded) if image is not None]
        epoch, first, _ = items[0]
        if self.change is None:
            if not kept:
                return None
            return self._held_out(decoded, labels, kept, first)
        if not kept:
            raise ValueError(f"None of the {len(items)} images of a batch can be decoded; the last is {items[-1][2].name}.")
        taken = [min((place for place in kept if place >= wanted), default=kept[0]) for wanted in range(len(items))]
        made = []
        with torch.random.fork_rng(devices=[]):
            for place, (_, number, _) in zip(taken, items, strict=True):
                self.seed_transforms(CROP_STREAM, epoch, self.rank, number)
                made.append(self.change(decoded[place]))  # type: ignore[arg-type]
        key = (self.seed, epoch, self.rank, first)
        if isinstance(made[0], Tensor):
            return ImageBatch(torch.stack(made), labels[taken], key)
        return batch_of_views(made, None, labels[taken], key)

    def _held_out(self, decoded: list[Tensor | None], labels: Tensor, kept: list[int], first: int) -> ImageBatch | ViewBatch:
        """The middles of the images that could be read, and pairs of views of them if there is a maker."""
        middles = [center(decoded[place], self.image_size) for place in kept]  # type: ignore[arg-type]
        key = (self.seed, HELD_OUT_STREAM, self.rank, first)
        if self.maker is None:
            return ImageBatch(torch.stack(middles), labels[kept], key)
        pairs = []
        with torch.random.fork_rng(devices=[]):
            for place, middle in zip(kept, middles, strict=True):
                self.seed_transforms(VIEW_STREAM, self.rank, first + place)
                whole = self.maker.views.geometric
                seen = (decoded[place],) if whole else (middle, Place(0, 0, *self.image_size))
                pairs.append(self.maker.pair(*seen))
        return batch_of_views(pairs, middles, labels[kept], key)

    def _decode(self, record: Record) -> Tensor | None:
        try:
            if record.content is None:
                raise ValueError("there is no image")
            if isinstance(record.content, str):  # a path, perhaps on another machine
                with fsspec.open(record.content, "rb") as file:
                    return read_image(io.BytesIO(file.read()), self.pixels)
            return read_image(io.BytesIO(record.content), self.pixels)
        except Exception as error:  # as in `ImageDataset.decode`
            if record.name not in self._named:
                self._named.add(record.name)
                reason = " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]])
                warnings.warn(
                    printable(f"{os.fsdecode(record.name)} cannot be decoded and is left out ({reason})."),
                    UnreadableImageWarning,
                    stacklevel=2,
                )
            return None


class HeldOutStream:
    """Batches of a stream to its end, without those of which not one image can be read.

    Not a DataLoader itself: Lightning would want to put a sampler for several processes on it, and each process has its own
    share of the stream already.

    Args:
        images: Decodes the records.
        sampler: Reads the process's share.
        settings: Further arguments of the DataLoader.
    """

    def __init__(self, images: StreamedImages, sampler: StreamBatches, **settings: Any) -> None:
        # Workers end with each pass: those of a loader that Lightning does not know would outlive the run.
        settings |= {"persistent_workers": False} if settings.get("num_workers") else {}
        self.loader: DataLoader[Any] = DataLoader(images, batch_sampler=sampler, collate_fn=already_collated, **settings)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches.

        Raises:
            ValueError: Not one image can be read.
        """
        total = kept = 0
        for batch in self.loader:
            total += 1
            if batch is not None:
                kept += 1
                yield batch
        if total and not kept:
            raise ValueError(
                f"Not one image of {total} held-out batches of this process can be decoded: repair the files that the "
                "warnings name, or choose another data.val_split."
            )
