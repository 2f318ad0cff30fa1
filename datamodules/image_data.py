"""What data modules of images share: augmentations, loaders, and how pixels are read.

Workers decode and crop to uint8; the device turns that into normalized floats, a quarter of the bytes to send.
Shapes: B batch, C channels, H W pixels.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from datamodules.batches import ImageBatch, ViewBatch
from datamodules.first_look import Look, Normalization, check_normalization, found_size, look
from datamodules.held_out import HeldOutLoader, held_out_loader
from datamodules.image_datasets import (
    HeldOutImages,
    HeldOutViews,
    NumberedImages,
    TrainingImages,
    TrainingViews,
)
from datamodules.image_files import Samples
from datamodules.pixel_format import PixelFormat
from datamodules.preprocessing import normalize
from datamodules.random_changes import Turns
from datamodules.rank_zero import from_rank_zero
from datamodules.resumable import ResumableLoader, SingleLoaderDataModule, already_collated
from datamodules.unreadable import UnreadableFiles
from datamodules.views import ViewMaker, Views


class ImageDataModule(SingleLoaderDataModule):
    """Images of some source, with or without classes, to train on, to hold out and to embed.

    A subclass implements `find` and `training_paths`. See `datamodules.ImageFolder` for the arguments and what happens to
    images that cannot be decoded.

    Raises:
        ValueError: A number out of its range, named together with what is allowed.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] | None,
        crop_scale: tuple[float, float],
        flip: float,
        vertical_flip: float = 0.0,
        rotate: bool = False,
        channels: int = 3,
        value_range: tuple[float, float] | None = None,
        normalization: Normalization | None = None,
        rand_augment: bool = False,
        views: Views | None = None,
        batch_size: int = 64,
        num_workers: int = 4,
        prefetch_factor: int | None = None,
        timeout: float = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self._image_size = None if size is None else (size[0], size[1])
        if min(self._image_size or (1, 1)) < 1 or batch_size < 1:
            raise ValueError(f"data.image_size={image_size}, data.batch_size={batch_size}: both must be at least 1.")
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"data.crop_scale={crop_scale}: give minimum and maximum area, 0 < minimum <= maximum <= 1.")
        if not 0 <= flip <= 1 or not 0 <= vertical_flip <= 1:
            raise ValueError(f"data.flip={flip}, data.vertical_flip={vertical_flip}: give probabilities in [0, 1].")
        if seed < 0 or num_workers < 0:
            raise ValueError(f"data.seed={seed}, data.num_workers={num_workers}: neither may be negative.")
        if (prefetch_factor is not None and prefetch_factor < 1) or not timeout >= 0:
            raise ValueError(
                f"data.prefetch_factor={prefetch_factor}, data.timeout={timeout}: give at least 1 batch, and seconds >= 0."
            )
        if views is not None and rand_augment:
            raise ValueError("data.rand_augment=true with data.views: an action cannot say what RandAugment did; drop one.")
        if channels != 3 and rand_augment:
            raise ValueError(
                f"data.channels={channels} with data.rand_augment, which changes the colors of 3 channels: set it to false."
            )
        if channels != 3 and views is not None and views.color_changes:
            flags = " ".join(f"--data.views.{name} 0" for name in views.color_changes)
            raise ValueError(
                f"data.channels={channels} with data.views that change the colors of 3 channels: let views differ by place "
                f"alone, --data.views.geometric true {flags}."
            )
        check_normalization(channels, normalization)
        self.value_range, self.normalization = value_range, normalization
        self.pixels = PixelFormat(channels).with_range(value_range)
        self.turns = Turns(vertical_flip, rotate) if vertical_flip or rotate else None
        self.crop_scale, self.flip, self.rand_augment, self.views = crop_scale, flip, rand_augment, views
        self.prefetch_factor, self.timeout = prefetch_factor, timeout
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.classes: list[str] = []
        self.predict_classes: list[str] = []
        self.predict_indices: list[int] | None = None
        self._samples: dict[str, Samples] = {}
        self._unreadable: dict[str, UnreadableFiles] = {}

    source_name = ""
    """What distinguishes the source of the images from others, where the folder `root` does not."""

    fetch: Callable[[bytes], Any] | None = None
    """Gets the content of an image by its path, where that is no file."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels; where none was given, those of the model, or before there is one `found_size`."""
        if self._image_size is None:
            self._image_size = found_size(self.training_paths(), self.fetch)
            height, width = self._image_size
            rank_zero_info(f"Images are resized to {height} x {width} pixels; data.image_size chooses another size.")
        return self._image_size

    @property
    def batch_type(self) -> type[ImageBatch] | type[ViewBatch]:
        """Type of its batches."""
        return ImageBatch if self.views is None else ViewBatch

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for a folder without."""
        return len(self.classes)

    @abstractmethod
    def training_paths(self) -> Any:
        """Paths of the images to train on, known before `setup`: a sequence of bytes, the same in all processes."""

    @abstractmethod
    def find(self, stage: str) -> tuple[dict[str, Samples], list[str], str]:
        """The samples by split, "train" and "val" or "predict"; the names of the classes; and a token for their flags.

        All ranks must find the same, in the same order, and the same token, which no other run has.
        """

    def setup(self, stage: str) -> None:
        """Find the images, and look at some of them; see `find` for the errors."""
        if self._image_size is None:  # that of the model, if it has one
            self._image_size = getattr(getattr(self.trainer, "lightning_module", None), "image_size", None)
        if ("predict" if stage == "predict" else "train") in self._samples:
            return
        samples, classes, token = self.find(stage)
        if not self._samples:  # before: a model may have said by now how it sees images
            self.pixels, said = from_rank_zero(self.trainer, lambda: self._look(samples))
            if said:
                rank_zero_info(said)
        self._samples |= samples
        self._unreadable |= {name: UnreadableFiles(len(part.labels), f"{token}-{name}") for name, part in samples.items()}
        if stage == "predict":
            self.predict_classes = classes
        else:
            self.classes = classes

    def _look(self, samples: dict[str, Samples]) -> Look:
        """How the images of the first split, which is trained or predicted on, are stored."""
        paths: Any = next(iter(samples.values())).paths
        return look(paths, self.pixels.channels, self.value_range, self.normalization, self.fetch)

    @property
    def predict_files(self) -> Samples:
        """Files that `predict` reads, and their classes (of `predict_classes`), in order."""
        return self._samples["predict"]

    @property
    def num_unreadable(self) -> int:
        """How many of them turned out to be unreadable."""
        return len(self._unreadable["predict"])

    def make_train_loader(self) -> ResumableLoader:
        train = self._samples["train"]
        images: TrainingImages | TrainingViews
        if self.views is None:
            images = TrainingImages(
                *(train, self.image_size, self.seed, self.crop_scale, self.flip, self.rand_augment),
                *(self.turns, self._unreadable["train"], self.pixels, self.fetch),
            )
        else:
            images = TrainingViews(
                *(train, self.image_size, self.seed, self._view_maker(training=True)),
                *(self.turns, self._unreadable["train"], self.pixels, self.fetch),
            )
        return ResumableLoader(images, self.train_sampler(len(images)), **self.loader_settings())

    def order(self) -> dict[str, Any]:
        return {"images": self._fingerprint} | self.augmentations()

    def augmentations(self) -> dict[str, Any]:
        """What the content of training samples depends on."""
        return {
            "image_size": self.image_size,
            "crop_scale": self.crop_scale,
            "flip": self.flip,
            "rand_augment": self.rand_augment,
            "views": None if self.views is None else self._views_settings(),
            "seed": self.seed,
        } | self._further()

    def _views_settings(self) -> dict[str, Any]:
        """Settings of the views; what came later only where it is in use, as in `_further`."""
        assert self.views is not None
        settings = asdict(self.views)
        return settings if self.views.recolored else {name: value for name, value in settings.items() if name != "recolored"}

    def _further(self) -> dict[str, Any]:
        """What came later, where it is in use: a checkpoint from before is not one of other samples."""
        turns, value_range = self.turns, self.value_range
        found: dict[str, Any] = {} if turns is None else {"vertical_flip": turns.vertical_flip, "rotate": turns.rotate}
        return found if value_range is None else found | {"value_range": list(value_range)}

    @cached_property
    def _fingerprint(self) -> str:
        """Distinguishes one set of training images from another, wherever the folder lies."""
        train = self._samples["train"]
        names = hashlib.sha256(b"\0".join(path.rsplit(b"/", 1)[-1] for path in train.paths.tolist()))
        return f"{len(train.labels)} ({names.hexdigest()[:12]})"

    def _view_maker(self, training: bool) -> ViewMaker:
        assert self.views is not None
        views = self.views if training else replace(self.views, recolored=False)  # which is of use in training alone
        return ViewMaker(views, self.image_size, self.crop_scale, self.flip)

    def plain_train_dataloader(self) -> DataLoader[Any]:
        """The training images as validation would see them, uncropped, in order, all of them in every process."""
        images = HeldOutImages(
            self._samples["train"], self.image_size, self.seed, self._unreadable["train"], self.pixels, self.fetch
        )
        return HeldOutLoader(images, batch_size=self.batch_size, collate_fn=already_collated, **self.loader_settings())

    def val_dataloader(self) -> DataLoader[Any]:
        held_out, unreadable = (self._samples["val"], self.image_size, self.seed), self._unreadable["val"]
        if self.views is None:
            images = HeldOutImages(*held_out, unreadable, self.pixels, self.fetch)
        else:
            images = HeldOutViews(*held_out, self._view_maker(training=False), unreadable, self.pixels, self.fetch)
        return held_out_loader(self, "validation", images)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """All images of the folder, or those of `predict_indices`, in order; processes take turns."""
        chosen: Any = range(len(self.predict_files.labels)) if self.predict_indices is None else self.predict_indices
        if len(chosen) < self.rank[1]:  # some are encoded again, so that each process has one
            chosen = [*chosen, *range(self.rank[1] - len(chosen))]
        images: Dataset[Any] = Subset(self._numbered(self.image_size), chosen)
        loader = held_out_loader(self, "predict", images)
        loader.may_be_empty = True  # what is left of a run that was cut may be files that nobody can read
        return loader

    def _numbered(self, size: tuple[int, int]) -> NumberedImages:
        return NumberedImages(self.predict_files, size, self.seed, self._unreadable["predict"], self.pixels, self.fetch)

    def thumbnails(self, indices: list[int], size: int) -> Tensor:
        """Small images of files of `predict`, (len(indices), C, size, size) in [0, 1]; black where one is unreadable."""
        return self._numbered((size, size)).small(indices)

    def on_after_batch_transfer(self, batch: ImageBatch | ViewBatch, dataloader_idx: int) -> ImageBatch | ViewBatch:
        """From uint8 to normalized floats, on the device."""
        uint8 = {name: value for name, value in batch._asdict().items() if getattr(value, "dtype", None) == torch.uint8}
        floats: Any = {name: normalize(value, self.pixels) for name, value in uint8.items()}
        batch = batch._replace(**floats)
        # Lightning has converted what was a float before; these floats are new.
        return batch if self.trainer is None else self.trainer.precision_plugin.convert_input(batch)
