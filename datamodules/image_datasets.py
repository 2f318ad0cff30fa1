"""Data sets of images: decoded and cut to size, a batch at a time, in uint8.

Shapes: C channels, H W pixels.
"""

import itertools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.batches import ImageBatch, ViewBatch
from datamodules.decoding import read_image
from datamodules.image_files import Samples, printable
from datamodules.pixel_format import PixelFormat
from datamodules.preprocessing import center
from datamodules.random_changes import Turns, random_change, random_pair
from datamodules.rng import CROP_STREAM, HELD_OUT_STREAM, VIEW_STREAM, seeded_generator
from datamodules.unreadable import UnreadableFiles
from datamodules.views import Pair, Place, ViewMaker


class UnreadableImageWarning(UserWarning):
    """A file that should be an image cannot be decoded."""


class ImageDataset(Dataset[Any]):
    """Decoded, cropped images, a batch at a time.

    Args:
        samples: Files and their classes.
        image_size: Height H and width W in pixels.
        seed: First element of each batch's key.
        unreadable: Flags of the files that cannot be decoded, shared with all that read the same; new ones if left out.
        pixels: Number of channels C, and values of black and white; RGB by default.
        fetch: Gets what `read_image` takes by the path of an image, where that is no file.
    """

    def __init__(
        self,
        samples: Samples,
        image_size: tuple[int, int],
        seed: int,
        unreadable: UnreadableFiles | None = None,
        pixels: PixelFormat | None = None,
        fetch: Callable[[bytes], Any] | None = None,
    ) -> None:
        self.samples, self.image_size, self.seed, self.fetch = samples, image_size, seed, fetch
        self.pixels = pixels or PixelFormat()
        self.unreadable = UnreadableFiles(len(samples.labels)) if unreadable is None else unreadable

    def __len__(self) -> int:
        return len(self.samples.labels)

    def read(self, index: int) -> Any:
        """What the file of an image holds, or an exception of whatever kind."""
        path = self.samples.paths[index]
        return read_image(path if self.fetch is None else self.fetch(path), self.pixels)

    def decode(self, index: int) -> Any:
        """One image, uint8 (C, H, W), or None if its file cannot be read.

        Then a warning names it and says why, once among all processes that share the flags, and nobody tries it again.
        """
        if index in self.unreadable:
            return None
        try:
            return self.read(index)
        except Exception as error:  # whatever damage does to a library, one file never ends a run
            count = self.unreadable.add(index)
            if count is not None:
                reason = " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]])
                warnings.warn(
                    printable(f"{os.fsdecode(self.samples.paths[index])} cannot be decoded and is left out ({reason}). ")
                    + f"{count} of {len(self)} so far.",
                    UnreadableImageWarning,
                    stacklevel=2,
                )
            return None

    def collate(self, images: list[Tensor], indices: list[int], key: tuple[int, ...]) -> ImageBatch:
        """A batch of images still in uint8."""
        return ImageBatch(torch.stack(images), self.samples.labels[indices], key)

    def seed_transforms(self, stream: int, *key: int) -> None:
        """Seed torch's global generator, which torchvision's transforms draw from, with (seed, stream, key).

        (`torch.manual_seed` would queue a call for CUDA, with a stack trace, for every image: four times a crop's cost.)
        """
        torch.default_generator.manual_seed(seeded_generator(self.seed, stream, *key).initial_seed())


def batch_of_views(pairs: list[Pair], images: list[Tensor] | None, labels: Tensor, key: tuple[int, ...]) -> ViewBatch:
    """A batch of pairs of views still in uint8, with the images as they are if they are held out."""
    sources, targets, actions, _, recolored = zip(*pairs, strict=True)
    third = None if recolored[0] is None else torch.stack(recolored)
    whole = None if images is None else torch.stack(images)
    return ViewBatch(torch.stack(sources), torch.stack(targets), torch.stack(actions), whole, labels, key, third)


class TrainingImages(ImageDataset):
    """Random crops, and flips if asked for, that are functions of (seed, epoch, index).

    Args:
        samples: Files and their classes.
        image_size: Height H and width W in pixels.
        seed: Seed of the random crops and flips.
        crop_scale: Minimum and maximum area of a crop, as fractions of the image.
        flip: Probability of a horizontal flip.
        rand_augment: Whether to apply two random distortions per image (RandAugment).
        turns: Further turns of the whole image.
        unreadable: Flags of the files that cannot be decoded, as in `ImageDataset`.
        pixels: As in `ImageDataset`.
        fetch: As in `ImageDataset`.
    """

    def __init__(
        self,
        samples: Samples,
        image_size: tuple[int, int],
        seed: int,
        crop_scale: tuple[float, float],
        flip: float,
        rand_augment: bool = False,
        turns: Turns | None = None,
        unreadable: UnreadableFiles | None = None,
        pixels: PixelFormat | None = None,
        fetch: Callable[[bytes], Any] | None = None,
    ) -> None:
        super().__init__(samples, image_size, seed, unreadable, pixels, fetch)
        self.augment = random_change(image_size, crop_scale, flip, rand_augment, turns)

    def __getitems__(self, items: list[tuple[int, int]]) -> ImageBatch:
        """The batch named by (epoch, index) pairs. The next readable image stands in for an unreadable one.

        Raises:
            ValueError: Not one image can be read.
        """
        images, indices = augmented(self, items, self.augment)
        return self.collate(images, indices, (self.seed, *items[0]))


class TrainingViews(ImageDataset):
    """Random pairs of views that are functions of (seed, epoch, index).

    Args:
        samples: Files and their classes.
        image_size: Height H and width W in pixels.
        seed: Seed of the random views.
        maker: Maker of the pairs of views.
        turns: Turns of the whole image, which both views show.
        unreadable: Flags of the files that cannot be decoded, as in `ImageDataset`.
        pixels: As in `ImageDataset`.
        fetch: As in `ImageDataset`.
    """

    def __init__(
        self,
        samples: Samples,
        image_size: tuple[int, int],
        seed: int,
        maker: ViewMaker,
        turns: Turns | None = None,
        unreadable: UnreadableFiles | None = None,
        pixels: PixelFormat | None = None,
        fetch: Callable[[bytes], Any] | None = None,
    ) -> None:
        super().__init__(samples, image_size, seed, unreadable, pixels, fetch)
        self.maker, self.augment = maker, random_pair(maker, turns)

    def __getitems__(self, items: list[tuple[int, int]]) -> ViewBatch:
        """The batch named by (epoch, index) pairs. The next readable image stands in for an unreadable one.

        Raises:
            ValueError: Not one image can be read.
        """
        pairs, indices = augmented(self, items, self.augment)
        return batch_of_views(pairs, None, self.samples.labels[indices], (self.seed, *items[0]))


def augmented(
    images: ImageDataset, items: list[tuple[int, int]], augment: Callable[[Any], Any]
) -> tuple[list[Any], list[int]]:
    """What becomes of the images named by (epoch, index) pairs, and the indices of those that were taken.

    Raises:
        ValueError: Not one image can be read.
    """
    made, indices = [], []
    with torch.random.fork_rng(devices=[]):
        for epoch, index in items:
            for candidate in itertools.chain(range(index, len(images)), range(index)):
                image = images.decode(candidate)
                if image is not None:
                    break
            else:
                raise ValueError(f"None of the {len(images)} training images can be decoded.")
            images.seed_transforms(CROP_STREAM, epoch, index)
            made.append(augment(image))
            indices.append(candidate)
    return made, indices


class HeldOutImages(ImageDataset):
    """The middle of each image, resized."""

    def __getitems__(self, indices: list[int]) -> ImageBatch | None:
        """The images at these indices, without those that cannot be read; None if not one of them can."""
        images, kept = self.readable(indices)
        if not kept:
            return None
        return self.collate(
            [center(image, self.image_size) for image in images], kept, (self.seed, HELD_OUT_STREAM, indices[0])
        )

    def readable(self, indices: list[int]) -> tuple[list[Tensor], list[int]]:
        """Those of the images that can be read, uncut, and their indices."""
        decoded = [(image, index) for index in indices if (image := self.decode(index)) is not None]
        return [image for image, _ in decoded], [index for _, index in decoded]


class NumberedImages(HeldOutImages):
    """The same, in batches whose key is the indices of its images."""

    def __getitems__(self, indices: list[int]) -> ImageBatch | None:
        """The images at these indices, without those that cannot be read; None if not one of them can."""
        images, kept = self.readable(indices)
        return self.collate([center(image, self.image_size) for image in images], kept, tuple(kept)) if kept else None

    def small(self, indices: list[int]) -> Tensor:
        """Images in [0, 1], (len(indices), C, H, W); black where one cannot be read."""
        black = torch.zeros(self.pixels.channels, *self.image_size, dtype=torch.uint8)
        decoded = [self.decode(index) for index in indices]
        return torch.stack([black if one is None else center(one, self.image_size) for one in decoded]).float() / 255


class HeldOutViews(HeldOutImages):
    """The middle of each image, and a pair of views of it that is a function of (seed, index).

    Geometric views are crops of the whole image, as in training.

    Args:
        samples: Files and their classes.
        image_size: Height H and width W in pixels.
        seed: Seed of the random views.
        maker: Maker of the pairs of views.
        unreadable: Flags of the files that cannot be decoded, as in `ImageDataset`.
        pixels: As in `ImageDataset`.
        fetch: As in `ImageDataset`.
    """

    def __init__(
        self,
        samples: Samples,
        image_size: tuple[int, int],
        seed: int,
        maker: ViewMaker,
        unreadable: UnreadableFiles | None = None,
        pixels: PixelFormat | None = None,
        fetch: Callable[[bytes], Any] | None = None,
    ) -> None:
        super().__init__(samples, image_size, seed, unreadable, pixels, fetch)
        self.maker = maker

    def __getitems__(self, indices: list[int]) -> ViewBatch | None:  # type: ignore[override]
        """The images at these indices, without those that cannot be read; None if not one of them can."""
        images, kept = self.readable(indices)
        if not kept:
            return None
        middles, pairs = [center(image, self.image_size) for image in images], []
        with torch.random.fork_rng(devices=[]):
            for image, middle, index in zip(images, middles, kept, strict=True):
                self.seed_transforms(VIEW_STREAM, index)
                geometric = self.maker.views.geometric
                pairs.append(self.maker.pair(image) if geometric else self.maker.pair(middle, Place(0, 0, *self.image_size)))
        key = (self.seed, HELD_OUT_STREAM, indices[0])
        return batch_of_views(pairs, middles, self.samples.labels[kept], key)
