"""Folders of pictures as a data module: ImageNet's layout, or any other folder.

Workers decode and crop to uint8; the device turns that into normalised floats, a quarter of the bytes to send.
Shapes: B batch, C channels, H W pixels.
"""

import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

from datamodules.batches import ImageBatch
from datamodules.downloads import SOURCES, DatasetName, download
from datamodules.randomness import seeded_generator
from datamodules.resumable import EpochBatches, ResumableDataModule, ResumableLoader, already_collated
from datamodules.samples import Samples, draw_per_class, part_of, read_list, read_picture, scan

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

CENTRE_CROP = 0.875
"""Side of the central crop that held-out pictures are cut to, as a fraction of the resized picture: 224 of 256."""

SPLIT_STREAM, SUBSET_STREAM, CROP_STREAM, HELD_OUT_STREAM = 0, 1, 2, 3  # uses of the seed


class UnreadableImageWarning(UserWarning):
    """A file that should be a picture cannot be decoded."""


class Pictures(Dataset[ImageBatch]):
    """Decoded, cropped pictures, a batch at a time.

    Args:
        samples: Files and classes.
        image_size: H and W in pixels.
        seed: First part of each batch's key.
    """

    def __init__(self, samples: Samples, image_size: tuple[int, int], seed: int) -> None:
        self.samples, self.image_size, self.seed = samples, image_size, seed
        self._unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self.samples.labels)

    def decode(self, index: int) -> Tensor | None:
        """One picture in RGB, uint8 (3, H, W), None if its file cannot be read: then a warning names it, once."""
        if index in self._unreadable:
            return None
        path = self.samples.paths[index].decode()
        try:
            return read_picture(path)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all that Pillow raises
            self._unreadable.add(index)
            reason = (str(error) or type(error).__name__).splitlines()[0]
            warnings.warn(
                f"{path} cannot be decoded and is left out ({reason}). {len(self._unreadable)} of {len(self)} so far in "
                "this process.",
                UnreadableImageWarning,
                stacklevel=2,
            )
            return None

    def collate(self, images: list[Tensor], indices: list[int], key: tuple[int, ...]) -> ImageBatch:
        """A batch of pictures still in uint8."""
        return ImageBatch(torch.stack(images), self.samples.labels[indices], key)


class TrainingPictures(Pictures):
    """Random crops, and flips if asked for, that are functions of (seed, epoch, index).

    Args:
        samples: Files and classes.
        image_size: H and W in pixels.
        seed: Of crops and flips.
        crop_scale: Area of a crop, least and greatest fraction of the picture.
        flip: Probability of a mirror image.
        rand_augment: Two random distortions per picture.
    """

    def __init__(
        self,
        samples: Samples,
        image_size: tuple[int, int],
        seed: int,
        crop_scale: tuple[float, float],
        flip: float,
        rand_augment: bool = False,
    ) -> None:
        super().__init__(samples, image_size, seed)
        # Of tensors: torch resizes its uint8 pictures several times faster than Pillow does its own.
        steps = [v2.RandomResizedCrop(image_size, scale=crop_scale), v2.RandomHorizontalFlip(flip)]
        self.augment = v2.Compose([*steps, v2.RandAugment()] if rand_augment else steps)

    def __getitems__(self, items: list[tuple[int, int]]) -> ImageBatch:
        """The batch named by (epoch, index) pairs. The next readable picture stands in for an unreadable one.

        Raises:
            ValueError: Not one picture can be read.
        """
        images, indices = [], []
        with torch.random.fork_rng(devices=[]):
            for epoch, index in items:
                for candidate in itertools.chain(range(index, len(self)), range(index)):
                    image = self.decode(candidate)
                    if image is not None:
                        break
                else:
                    raise ValueError(f"None of the {len(self)} training pictures can be decoded.")
                # torchvision's transforms draw from the global generator. (torch.manual_seed would queue a call for
                # CUDA, with a stack trace, for every picture: four times the cost of the crop.)
                seed = seeded_generator(self.seed, CROP_STREAM, epoch, index).initial_seed()
                torch.default_generator.manual_seed(seed)
                images.append(self.augment(image))
                indices.append(candidate)
        return self.collate(images, indices, (self.seed, *items[0]))


class HeldOutPictures(Pictures):
    """The middle of each picture, resized."""

    def __getitems__(self, indices: list[int]) -> ImageBatch:
        """The pictures at these indices, without those that cannot be read.

        Raises:
            ValueError: Not one of them can be read.
        """
        decoded = [(index, image) for index in indices if (image := self.decode(index)) is not None]
        if not decoded:
            raise ValueError(
                f"None of {len(indices)} held-out pictures can be decoded, first {self.samples.paths[indices[0]]!r}."
            )
        images = [self._centre(image) for _, image in decoded]
        return self.collate(images, [index for index, _ in decoded], (self.seed, HELD_OUT_STREAM, indices[0]))

    def _centre(self, image: Tensor) -> Tensor:
        """A picture of any size to uint8 (3, H, W)."""
        height, width = self.image_size
        if image.shape[1:] != (height, width):
            scale = max(height / image.shape[1], width / image.shape[2]) / CENTRE_CROP
            image = vision.resize(image, [math.ceil(side * scale) for side in image.shape[1:]])
            image = vision.center_crop(image, [height, width])
        return image


class ImageFolder(ResumableDataModule):
    """Pictures in folders, with or without classes.

    The training pictures are those of root/train, or of root if there is no such folder: in a sub-folder per class, or
    without classes and sub-folders. Those of root/val are for validation; if there is no such folder, `val_fraction` of the
    training pictures is held out instead. `test` reads what validation reads.

    Args:
        root: Folder of the pictures.
        image_size: Height and width in pixels, one number or two.
        val_fraction: Part of each class that is held out, in (0, 1), where there is no folder val.
        fraction: Part of each class that is trained on, in (0, 1], at least one picture of each: 0.01 and 0.1 are usual.
            Drawn once per seed.
        download: Name of a public data set that is downloaded into `root` if there is no such folder: "cifar10", "stl10" or
            "imagenette".
        file_list: Text file that names the training pictures, one path relative to the training folder a line.
        crop_scale: Area of a training crop, least and greatest fraction of the picture; (1, 1) with a square picture is
            the whole.
        flip: Probability of a mirror image in training. The released I-JEPA has none.
        rand_augment: Two random distortions per training picture (RandAugment), for fine-tuning.
        batch_size: Pictures per batch and process.
        num_workers: Processes that decode; 0 decodes in the training process.
        seed: Of splits, subsets, orders, crops and masks.

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
        rand_augment: bool = False,
        download: DatasetName | None = None,
        batch_size: int = 64,
        num_workers: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root = Path(root)
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        if min(self.image_size) < 1 or batch_size < 1:
            raise ValueError(f"data.image_size={image_size}, data.batch_size={batch_size}: both must be at least 1.")
        if not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction={val_fraction}: choose a part in (0, 1) to hold out.")
        if not 0 < fraction <= 1:
            raise ValueError(f"data.fraction={fraction}: choose a part of each class in (0, 1].")
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"data.crop_scale={crop_scale}: give the least and greatest area, 0 < least <= greatest <= 1.")
        if not 0 <= flip <= 1:
            raise ValueError(f"data.flip={flip}: give a probability in [0, 1].")
        if seed < 0 or num_workers < 0:
            raise ValueError(f"data.seed={seed}, data.num_workers={num_workers}: neither may be negative.")
        self.val_fraction, self.fraction, self.file_list = val_fraction, fraction, file_list
        self.crop_scale, self.flip, self.rand_augment = crop_scale, flip, rand_augment
        if download is not None and download not in SOURCES:
            raise ValueError(f"data.download={download!r}: choose one of {', '.join(SOURCES)}.")
        self.download = download
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.classes: list[str] = []
        self._samples: dict[str, Samples] = {}

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for a folder without."""
        return len(self.classes)

    def prepare_data(self) -> None:
        """Download the pictures, if they are asked for by name and not there."""
        if self.download is not None:
            download(self.download, self.root)

    def setup(self, stage: str) -> None:
        """Find the pictures.

        Raises:
            FileNotFoundError: A folder, a list or a picture of it is missing.
            ValueError: No pictures, an empty class, or classes that differ between training and validation.
        """
        if self._samples:
            return
        split = (self.root / "val").is_dir()
        folder = self.root / "train" if (self.root / "train").is_dir() else self.root
        train, self.classes = scan(folder)
        if split:
            val, _ = scan(self.root / "val", self.classes or None)
        else:
            held_out = draw_per_class(train.labels, self.val_fraction, seeded_generator(self.seed, SPLIT_STREAM))
            if held_out.all():
                raise ValueError(f"{folder} has too few pictures to hold out {self.val_fraction:.0%} of each class.")
            val, train = part_of(train, held_out), part_of(train, ~held_out)
        if self.file_list is not None:
            train = read_list(Path(self.file_list), folder, self.classes)
            if not split:
                val = part_of(val, torch.from_numpy(~np.isin(val.paths, train.paths)))
        if self.fraction < 1:
            train = part_of(train, draw_per_class(train.labels, self.fraction, seeded_generator(self.seed, SUBSET_STREAM)))
        # In one mixed order, so that the first batches of a validation have all classes.
        order = torch.randperm(len(val.labels), generator=seeded_generator(self.seed, HELD_OUT_STREAM))
        self._samples = {"train": train, "val": Samples(val.paths[order.numpy()], val.labels[order])}

    def make_train_loader(self) -> ResumableLoader:
        train = self._samples["train"]
        sampler = EpochBatches(len(train.labels), self.batch_size, self.seed, *self.rank)
        pictures = TrainingPictures(train, self.image_size, self.seed, self.crop_scale, self.flip, self.rand_augment)
        return ResumableLoader(pictures, sampler, self.num_workers, pin_memory=self.on_gpu)

    def plain_train_dataloader(self) -> DataLoader[Any]:
        """The training pictures as validation would see them, uncropped, in order, all of them in every process."""
        pictures = HeldOutPictures(self._samples["train"], self.image_size, self.seed)
        return DataLoader(pictures, batch_size=self.batch_size, collate_fn=already_collated, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Any]:
        pictures = HeldOutPictures(self._samples["val"], self.image_size, self.seed)
        return DataLoader(
            pictures,
            batch_size=self.batch_size,
            sampler=self.held_out_sampler("validation", pictures),
            collate_fn=already_collated,
            num_workers=self.num_workers,
            pin_memory=self.on_gpu,
        )

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """From uint8 to normalised floats, on the device."""
        return batch._replace(images=normalise(batch.images))


def normalise(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 of ImageNet's mean 0 and standard deviation 1."""
    return vision.normalize(vision.to_dtype(images, torch.float32, scale=True), list(IMAGENET_MEAN), list(IMAGENET_STD))
