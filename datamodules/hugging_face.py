"""Hugging Face data sets of images: parquet, arrow, WebDataset shards, or a name of the Hub; on a disk or streamed."""

import io
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.first_look import Look, Normalization, look
from datamodules.hugging_face_source import HuggingFaceSource
from datamodules.image_data import ImageDataModule
from datamodules.image_files import Samples
from datamodules.image_split import draw_per_class, part_of
from datamodules.image_stream import HeldOutStream, StreamBatches, StreamedImages
from datamodules.random_changes import random_change, random_pair
from datamodules.rank_zero import from_rank_zero
from datamodules.resumable import ResumableLoader
from datamodules.rng import HELD_OUT_STREAM, SPLIT_STREAM, SUBSET_STREAM, seeded_generator
from datamodules.views import Views

LOOKED_AT = 200
"""How many images of a stream are looked at before training."""


class HuggingFaceImages(ImageDataModule):
    """Images of a data set that Hugging Face's `datasets` reads (pip install "jepa-lightning[hf]").

    On a disk (`streaming` false) it works as a folder does: random access, a split by class, resume in mid-epoch. Streamed,
    each process reads shards of its own, if their number is a multiple of the number of processes, or else every
    image of its turn; a buffer shuffles them. A process whose shards hold fewer images than its share of an epoch begins
    them anew, and says so. A run that was cut reads up to where it was and goes on with the next image, bit for bit: none
    is lost, none comes twice.

    Args:
        path: Name on the Hub, folder of `save_to_disk`, or kind of files: "parquet", "arrow", "webdataset", "imagefolder".
        image_size: Height and width in pixels, one number or two; null as for `ImageFolder`, but not of a stream.
        data_files: Files by split for a kind of files: {"train": "DIR/train-*.parquet", "validation": "DIR/val.parquet"}.
        name: Configuration of a data set of the Hub.
        split: Split to train on, and the one that `predict` embeds.
        val_split: Split to validate on. On a disk `val_fraction` of each class of `split` is held out if left out.
        val_fraction: Fraction that is held out, in (0, 1), where there is no `val_split`.
        fraction: Fraction of each class that is trained on, in (0, 1]; not of a stream.
        image_column: Column of the images; the first one of images by default.
        label_column: Column of the classes, integers or text; "label", "labels", "cls" or "fine_label" by default, if it is
            there; "" for none. An image without a class has label -1.
        streaming: Whether to read the shards while training, not before.
        size: Images of an epoch of a stream, all processes together; that of the data set if it says so.
        shuffle_buffer: Images of a stream that the next one is drawn from, in each process.
        crop_scale: Minimum and maximum area of a training crop, as fractions of the image.
        flip: Probability of a horizontal flip in training.
        vertical_flip: As for `ImageFolder`.
        rotate: As for `ImageFolder`.
        channels: As for `ImageFolder`.
        value_range: As for `ImageFolder`.
        normalization: As for `ImageFolder`.
        rand_augment: As for `ImageFolder`.
        views: As for `ImageFolder`.
        batch_size: Images per batch and process.
        num_workers: Number of processes that decode.
        timeout: Seconds to wait for a batch before the run ends with an error; 0 waits for ever.
        seed: Seed of splits, orders, crops and masks.

    Raises:
        ModuleNotFoundError: The package datasets is not installed.
        ValueError: A number out of its range, or a stream without a size or a split to validate on.
    """

    def __init__(
        self,
        path: str,
        image_size: int | tuple[int, int] | None = 224,
        data_files: dict[str, str] | None = None,
        name: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        val_fraction: float = 0.1,
        fraction: float = 1.0,
        image_column: str | None = None,
        label_column: str | None = None,
        streaming: bool = False,
        size: int | None = None,
        shuffle_buffer: int = 1000,
        crop_scale: tuple[float, float] = (0.3, 1.0),
        flip: float = 0.0,
        vertical_flip: float = 0.0,
        rotate: bool = False,
        channels: int = 3,
        value_range: tuple[float, float] | None = None,
        normalization: Normalization | None = None,
        rand_augment: bool = False,
        views: Views | None = None,
        batch_size: int = 64,
        num_workers: int = 4,
        timeout: float = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            image_size=image_size,
            crop_scale=crop_scale,
            flip=flip,
            vertical_flip=vertical_flip,
            rotate=rotate,
            channels=channels,
            value_range=value_range,
            normalization=normalization,
            rand_augment=rand_augment,
            views=views,
            batch_size=batch_size,
            num_workers=num_workers,
            timeout=timeout,
            seed=seed,
        )
        if not 0 < val_fraction < 1 or not 0 < fraction <= 1:
            raise ValueError(f"data.val_fraction={val_fraction}, data.fraction={fraction}: choose fractions of the images.")
        if (size is not None and size < 1) or shuffle_buffer < 1:
            raise ValueError(f"data.size={size}, data.shuffle_buffer={shuffle_buffer}: give at least 1.")
        if streaming and image_size is None:
            raise ValueError("data.image_size=null with data.streaming: a stream has no images at hand; give a size.")
        if streaming and (fraction < 1 or val_split is None):
            raise ValueError(
                "data.streaming=true needs data.val_split, and takes no data.fraction: to hold out or choose images of each "
                "class, all of them must be at hand. Give a split of its own, or leave streaming off."
            )
        self.split, self.val_split, self.streaming, self.size = split, val_split, streaming, size
        self.val_fraction, self.fraction, self.shuffle_buffer = val_fraction, fraction, shuffle_buffer
        self.source = HuggingFaceSource(path, name, data_files, image_column, label_column, streaming)
        self.fetch = self.source.fetch
        self.root = Path(path) if data_files is None else Path(next(iter(data_files.values()))).parent
        self.source_name = " ".join(str(part) for part in (path, name, data_files, split) if part is not None)
        self.num_unlabeled = 0  # images without a class among those with one
        self._opened = False

    def prepare_data(self) -> None:
        """Download and convert what is not there, once."""
        if not self.streaming:
            for split in {self.split, self.val_split} - {None}:
                self.source.split(split)  # type: ignore[arg-type]

    def training_paths(self) -> np.ndarray:
        return self.source.rows(self.split)[0].paths

    def find(self, stage: str) -> tuple[dict[str, Samples], list[str], str]:
        """The rows of each split.

        Raises:
            ValueError: A column that is not there, or no images.
        """
        token = from_rank_zero(self.trainer, lambda: uuid4().hex)
        train, classes = self.source.rows(self.split)
        if stage == "predict":
            return {"predict": train}, classes, token
        if self.val_split is not None:
            val, _ = self.source.rows(self.val_split, classes)
        else:
            held_out = draw_per_class(train.labels, self.val_fraction, seeded_generator(self.seed, SPLIT_STREAM), spare=1)
            val, train = part_of(train, held_out), part_of(train, ~held_out)
        if self.fraction < 1:
            train = part_of(train, draw_per_class(train.labels, self.fraction, seeded_generator(self.seed, SUBSET_STREAM)))
        order = torch.randperm(len(val.labels), generator=seeded_generator(self.seed, HELD_OUT_STREAM))
        kinds = f" in {len(classes)} classes" if classes else ""
        found = f"Found {len(train.labels)} images{kinds} to train on and {len(val.labels)} to hold out in {self.root}."
        self.num_unlabeled = int((train.labels < 0).sum() + (val.labels < 0).sum()) if classes else 0
        rank_zero_info(found + (f" {self.num_unlabeled} of them have no class." if self.num_unlabeled else ""))
        return {"train": train, "val": Samples(val.paths[order.numpy()], val.labels[order])}, classes, token

    def setup(self, stage: str) -> None:
        """Find the images, or open the stream and look at its beginning; see `find` for the errors.

        Raises:
            ValueError: A stream that does not say how many images it has, or one that is to be embedded.
        """
        if not self.streaming:
            super().setup(stage)
        elif stage == "predict":
            raise ValueError("data.streaming=true: predict embeds what is on a disk; leave streaming off.")
        elif not self._opened:
            opened = self.source.split(self.split)
            info = (opened.info.splits or {}).get(self.split)
            self.size = self.size or getattr(info, "num_examples", None)
            if not self.size:
                raise ValueError(f"{self.root} does not say how many images it has: give data.size, those of an epoch.")
            self.classes = self.source.labels_of(opened)[1]
            self.source.split(self.val_split or "")  # for its errors
            self.pixels, said = from_rank_zero(self.trainer, self._look_at_stream)
            found = f"A stream of {opened.num_shards} shards of {self.root}, {self.size} images an epoch."
            rank_zero_info(f"{found} {said}".strip())
            self._opened = True

    def _look_at_stream(self) -> Look:
        contents = [record.content for record in itertools.islice(self.source.records(self.split), LOOKED_AT)]
        places, channels = [str(place).encode() for place in range(len(contents))], self.pixels.channels

        def fetch(place: bytes) -> Any:
            content = contents[int(place)]
            return io.BytesIO(content) if isinstance(content, bytes) else content

        return look(places, channels, self.value_range, self.normalization, fetch)

    def make_train_loader(self) -> ResumableLoader:
        if not self.streaming:
            return super().make_train_loader()
        rank, num_ranks = self.rank
        assert self.size is not None
        length = self.size // (self.batch_size * num_ranks)
        if not length:
            raise ValueError(
                f"data.size={self.size} does not fill one batch of {self.batch_size} on {num_ranks} process(es)."
            )
        change: Callable[[Tensor], Any]
        if self.views is None:
            change = random_change(self.image_size, self.crop_scale, self.flip, self.rand_augment, self.turns)
        else:
            change = random_pair(self._view_maker(training=True), self.turns)
        images = StreamedImages(self.image_size, self.seed, rank, change, self.pixels)
        stream = partial(self.source.records, self.split, self.rank, (self.seed, self.shuffle_buffer))
        repeat = self.trainer is not None and self.trainer.overfit_batches > 0
        sampler: Any = StreamBatches(stream, self.batch_size, length, repeat, unequal=num_ranks > 1)
        return ResumableLoader(images, sampler, **self.loader_settings())

    def val_dataloader(self) -> Any:
        if not self.streaming:
            return super().val_dataloader()
        assert self.val_split is not None
        maker = None if self.views is None else self._view_maker(training=False)
        images = StreamedImages(self.image_size, self.seed, self.rank[0], None, self.pixels, maker)
        sampler = StreamBatches(partial(self.source.records, self.val_split, self.rank, None), self.batch_size, None)
        return HeldOutStream(images, sampler, **self.loader_settings())

    def test_dataloader(self) -> Any:
        return self.val_dataloader()

    def plain_train_dataloader(self) -> DataLoader[Any]:
        """As for a folder.

        Raises:
            ValueError: The images are streamed.
        """
        if self.streaming:
            raise ValueError("data.streaming=true: this probe reads all training images at will; leave streaming off.")
        return super().plain_train_dataloader()

    def order(self) -> dict[str, Any]:
        if not self.streaming:
            return super().order() | {"source": self.source_name}
        stream = {
            "path": self.source.path,
            "files": self.source.data_files,
            "split": self.split,
            "size": self.size,
            "shuffle_buffer": self.shuffle_buffer,
        }
        return stream | self.augmentations() | {"processes": self.rank[1]}
