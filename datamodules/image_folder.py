"""Folders of images as a data module: ImageNet's layout, or any other folder.

Workers decode and crop to uint8; the device turns that into normalized floats, a quarter of the bytes to send.
Shapes: B batch, C channels, H W pixels.
"""

import hashlib
import warnings
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from datamodules.batches import ImageBatch, ViewBatch
from datamodules.downloads import SOURCES, DatasetName, download
from datamodules.first_look import Look, Normalization, check_normalization, look
from datamodules.image_datasets import (
    HeldOutImages,
    HeldOutLoader,
    HeldOutViews,
    NumberedImages,
    TrainingImages,
    TrainingViews,
    Turns,
)
from datamodules.image_files import Samples, Scan, all_images, describe, scan, split_images
from datamodules.pixel_format import PixelFormat
from datamodules.preprocessing import normalize
from datamodules.rank_zero import from_rank_zero
from datamodules.resumable import ResumableLoader, SingleLoaderDataModule, already_collated
from datamodules.unreadable import UnreadableFiles
from datamodules.views import ViewMaker, Views


class ImageFolder(SingleLoaderDataModule):
    """Images in folders, with or without classes.

    The training images are those of root/train, or of root if there is no such folder: in a sub-folder per class, or
    without classes and sub-folders. Those of root/val are for validation; if there is no such folder, `val_fraction` of the
    training images is held out instead, though never the only image of a class. `test` reads what validation reads.

    What is found and what is left out, and why, is said when the folders are read. A file that cannot be decoded is named
    once in a run and left out: in training another image stands in, held-out images are that many fewer.

    >>> from datamodules import SyntheticImages
    >>> SyntheticImages("my_images", size=20).prepare_data()
    >>> data = ImageFolder("my_images", image_size=32, val_fraction=0.25, batch_size=5)
    >>> data.setup("fit"), data.num_classes
    (None, 5)

    Args:
        root: Folder of the images.
        image_size: Height and width in pixels, one number or two.
        val_fraction: Fraction of each class that is held out, in (0, 1), where there is no folder val.
        fraction: Fraction of each class that is trained on, in (0, 1], at least one image of each: 0.01 and 0.1 are
            usual. Drawn once per seed.
        download: Name of a public data set that is downloaded into `root` if there is no such folder: "cifar10", "stl10" or
            "imagenette".
        file_list: Text file that names the training images, one path relative to the training folder a line.
        crop_scale: Minimum and maximum area of a training crop, as fractions of the image; (1, 1) with a square image is
            the whole.
        flip: Probability of a horizontal flip in training. The released I-JEPA has none.
        vertical_flip: Probability of a vertical flip in training, for images that have no upper side.
        rotate: Whether training images are turned by a random multiple of 90 degrees.
        channels: Number of channels: 1 reads gray, 3 color, any other number images of as many bands, such as a TIFF with
            a page for each. Views are of color.
        value_range: Values that are black and white in images of more than 8 bits. By default they are found: white is the
            largest number of as many bits as are in use, of floats 1 or the largest value.
        normalization: "imagenet" for the mean and standard deviation of ImageNet, "found" for those of the images; by
            default ImageNet's for 3 channels. A model from a checkpoint keeps the range and normalization of its training.
        rand_augment: Whether to apply two random distortions per training image (RandAugment), for fine-tuning.
        views: Settings of pairs of views and the action that leads from one to the other, which IWM needs; see
            `datamodules.views.Views`. Plain images if left out.
        batch_size: Images per batch and process.
        num_workers: Number of processes that decode, as long as the run lasts; 0 decodes in the training process.
        prefetch_factor: Number of batches that each worker has ready, at least 1; torch's 2 if left out.
        timeout: Seconds to wait for a batch before the run ends with an error, for file systems that hang; 0 waits for ever.
        seed: Seed of splits, subsets, orders, crops and masks.

    Raises:
        ValueError: A number out of its range, named together with what is allowed.
    """

    def __init__(
        self,
        root: str,
        image_size: int | tuple[int, int] = 224,
        val_fraction: float = 0.1,
        fraction: float = 1.0,
        file_list: str | None = None,
        crop_scale: tuple[float, float] = (0.3, 1.0),
        flip: float = 0.0,
        vertical_flip: float = 0.0,
        rotate: bool = False,
        channels: int = 3,
        value_range: tuple[float, float] | None = None,
        normalization: Normalization | None = None,
        rand_augment: bool = False,
        views: Views | None = None,
        download: DatasetName | None = None,
        batch_size: int = 64,
        num_workers: int = 4,
        prefetch_factor: int | None = None,
        timeout: float = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root = Path(root)
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        if min(self.image_size) < 1 or batch_size < 1:
            raise ValueError(f"data.image_size={image_size}, data.batch_size={batch_size}: both must be at least 1.")
        if not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction={val_fraction}: choose a fraction in (0, 1) to hold out.")
        if not 0 < fraction <= 1:
            raise ValueError(f"data.fraction={fraction}: choose a fraction of each class in (0, 1].")
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"data.crop_scale={crop_scale}: give minimum and maximum area, 0 < minimum <= maximum <= 1.")
        if not 0 <= flip <= 1 or not 0 <= vertical_flip <= 1:
            raise ValueError(f"data.flip={flip}, data.vertical_flip={vertical_flip}: give probabilities in [0, 1].")
        check_normalization(channels, normalization)
        self.value_range, self.normalization = value_range, normalization
        self.pixels = PixelFormat(channels).with_range(value_range)
        self.turns = Turns(vertical_flip, rotate) if vertical_flip or rotate else None
        if seed < 0 or num_workers < 0:
            raise ValueError(f"data.seed={seed}, data.num_workers={num_workers}: neither may be negative.")
        if (prefetch_factor is not None and prefetch_factor < 1) or not timeout >= 0:
            raise ValueError(
                f"data.prefetch_factor={prefetch_factor}, data.timeout={timeout}: give at least 1 batch, and seconds >= 0."
            )
        self.prefetch_factor, self.timeout = prefetch_factor, timeout
        self.val_fraction, self.fraction, self.file_list = val_fraction, fraction, file_list
        self.crop_scale, self.flip, self.rand_augment = crop_scale, flip, rand_augment
        if views is not None and rand_augment:
            raise ValueError("data.rand_augment=true with data.views: an action cannot say what RandAugment did; drop one.")
        if channels != 3 and (views is not None or rand_augment):
            raise ValueError(
                f"data.channels={channels} with data.views or data.rand_augment: they change colors; leave them out."
            )
        self.views = views
        if download is not None and download not in SOURCES:
            raise ValueError(f"data.download={download!r}: choose one of {', '.join(SOURCES)}.")
        self.download = download
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.classes: list[str] = []
        self.predict_classes: list[str] = []
        self.predict_indices: list[int] | None = None
        self._samples: dict[str, Samples] = {}
        self._unreadable: dict[str, UnreadableFiles] = {}

    @property
    def batch_type(self) -> type[ImageBatch] | type[ViewBatch]:
        """Type of its batches."""
        return ImageBatch if self.views is None else ViewBatch

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for a folder without."""
        return len(self.classes)

    def prepare_data(self) -> None:
        """Download the images, if they are asked for by name and not there."""
        if self.download is not None:
            download(self.download, self.root)

    def setup(self, stage: str) -> None:
        """Find the images: on rank 0, which broadcasts them, so that all ranks have the same files in the same order.

        Raises:
            FileNotFoundError: A folder, a list or an image of it is missing.
            ValueError: No images, an empty class, classes that differ between training and validation, or a list that
                leads out of the folder.
        """
        if ("predict" if stage == "predict" else "train") in self._samples:
            return
        find = self._find if stage != "predict" else lambda: all_images(self.root, self._scan)
        samples, classes, token = from_rank_zero(self.trainer, find)
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

    def _find(self) -> tuple[dict[str, Samples], list[str], str]:
        """The samples by split, the names of the classes, and what names this run's flags of unreadable files."""
        file_list = None if self.file_list is None else Path(self.file_list)
        found, classes, alone = split_images(self.root, self.val_fraction, self.fraction, file_list, self.seed, self._scan)
        if alone:
            rank_zero_info(f"{alone} of {len(classes)} classes have one image each, which is not held out.")
        return found, classes, uuid4().hex

    def _look(self, samples: dict[str, Samples]) -> Look:
        """How the images of the first split, which is trained or predicted on, are stored."""
        first = next(iter(samples.values()))
        return look(first.paths, self.pixels.channels, self.value_range, self.normalization)  # type: ignore[arg-type]

    @property
    def predict_files(self) -> Samples:
        """Files that `predict` reads, and their classes (of `predict_classes`), in order."""
        return self._samples["predict"]

    @property
    def num_unreadable(self) -> int:
        """How many of them turned out to be unreadable."""
        return len(self._unreadable["predict"])

    def _scan(self, folder: Path, classes: list[str] | None = None) -> Scan:
        """What a folder holds, which is also said."""
        found = scan(folder, classes)
        holds, left_out = describe(folder, found)
        rank_zero_info(holds)
        if left_out:
            warnings.warn(left_out, stacklevel=2)
        return found

    def make_train_loader(self) -> ResumableLoader:
        train = self._samples["train"]
        images: TrainingImages | TrainingViews
        if self.views is None:
            images = TrainingImages(
                *(train, self.image_size, self.seed, self.crop_scale, self.flip, self.rand_augment),
                *(self.turns, self._unreadable["train"], self.pixels),
            )
        else:
            images = TrainingViews(
                *(train, self.image_size, self.seed, self._view_maker()),
                *(self.turns, self._unreadable["train"], self.pixels),
            )
        return ResumableLoader(images, self.train_sampler(len(images)), **self.loader_settings())

    def order(self) -> dict[str, Any]:
        return {
            "images": self._fingerprint,
            "image_size": self.image_size,
            "crop_scale": self.crop_scale,
            "flip": self.flip,
            "vertical_flip": self.turns.vertical_flip if self.turns else 0.0,
            "rotate": self.turns is not None and self.turns.rotate,
            "rand_augment": self.rand_augment,
            "views": None if self.views is None else asdict(self.views),
            "seed": self.seed,
        }

    @cached_property
    def _fingerprint(self) -> str:
        """Distinguishes one set of training images from another, wherever the folder lies."""
        train = self._samples["train"]
        names = hashlib.sha256(b"\0".join(path.rsplit(b"/", 1)[-1] for path in train.paths.tolist()))
        return f"{len(train.labels)} ({names.hexdigest()[:12]})"

    def _view_maker(self) -> ViewMaker:
        assert self.views is not None
        return ViewMaker(self.views, self.image_size, self.crop_scale, self.flip)

    def plain_train_dataloader(self) -> DataLoader[Any]:
        """The training images as validation would see them, uncropped, in order, all of them in every process."""
        images = HeldOutImages(self._samples["train"], self.image_size, self.seed, self._unreadable["train"], self.pixels)
        return HeldOutLoader(images, batch_size=self.batch_size, collate_fn=already_collated, **self.loader_settings())

    def val_dataloader(self) -> DataLoader[Any]:
        held_out, unreadable = (self._samples["val"], self.image_size, self.seed), self._unreadable["val"]
        if self.views is None:
            images = HeldOutImages(*held_out, unreadable, self.pixels)
        else:
            images = HeldOutViews(*held_out, self._view_maker(), unreadable, self.pixels)
        return HeldOutLoader(
            images,
            batch_size=self.batch_size,
            sampler=self.held_out_sampler("validation", images),
            collate_fn=already_collated,
            **self.loader_settings(),
        )

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """All images of the folder, or those of `predict_indices`, in order; processes take turns."""
        chosen: Any = range(len(self.predict_files.labels)) if self.predict_indices is None else self.predict_indices
        if len(chosen) < self.rank[1]:  # some are encoded again, so that each process has one
            chosen = [*chosen, *range(self.rank[1] - len(chosen))]
        images: Dataset[Any] = Subset(self._numbered(self.image_size), chosen)
        loader = HeldOutLoader(
            images,
            batch_size=self.batch_size,
            sampler=self.held_out_sampler("predict", images),
            collate_fn=already_collated,
            **self.loader_settings(),
        )
        loader.may_be_empty = True  # what is left of a run that was cut may be files that nobody can read
        return loader

    def _numbered(self, size: tuple[int, int]) -> NumberedImages:
        return NumberedImages(self.predict_files, size, self.seed, self._unreadable["predict"], self.pixels)

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
