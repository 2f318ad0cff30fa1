"""Folders of images and masks as a data module: what each pixel shows.

Shapes: B batch, C channels, H W pixels.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

from datamodules.batches import VOID, SegmentationBatch
from datamodules.decoding import FORMATS
from datamodules.first_look import Normalization, check_normalization, look
from datamodules.held_out import held_out_loader
from datamodules.image_datasets import ImageDataset, augmented
from datamodules.image_files import Samples, files_below, printable
from datamodules.pixel_format import PixelFormat
from datamodules.preprocessing import normalize
from datamodules.rank_zero import from_rank_zero
from datamodules.resumable import ResumableLoader, SingleLoaderDataModule
from datamodules.rng import HELD_OUT_STREAM, seeded_generator
from datamodules.unreadable import UnreadableFiles

SOME_MASKS = 200
"""How many training masks are looked at where the number of classes is given."""


def read_mask(path: str | bytes, void: int | None = None) -> Tensor:
    """The class of each pixel, as the numbers in the file: int64 (H, W), `VOID` where nothing counts.

    Of an image with a palette these are the places in it. (Masks have no orientation: they lie like the image once that is
    upright.)

    Args:
        path: Path of the file.
        void: Number in the file that stands for pixels that do not count.

    Raises:
        Exception: The file cannot be decoded, see `datamodules.decoding.read_image`.
        ValueError: It is in color, or holds fractions.
    """
    with Image.open(os.fsdecode(path), formats=FORMATS) as image:
        values = np.array(image)
    if values.ndim != 2 or np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"its mask is in {image.mode}: write the index of the class of each pixel, in gray or a palette")
    mask = torch.from_numpy(values.astype(np.int64))
    return mask if void is None else mask.masked_fill_(mask == void, VOID)


class SegmentationImages(ImageDataset):
    """Images and masks, cut and flipped together in training, resized in evaluation.

    Args:
        samples: Files of the images.
        masks: Files of their masks, in the same order, as bytes.
        image_size: Height H and width W in pixels.
        seed: Seed of crops and flips.
        num_classes: Number of classes; a mask with others is left out.
        void: Number in masks that stands for pixels that do not count.
        augment: Random changes of a pair in training; None to resize the whole.
        unreadable: Flags of the files that cannot be decoded.
        pixels: How the images are read.
    """

    def __init__(
        self,
        samples: Samples,
        masks: np.ndarray,
        image_size: tuple[int, int],
        seed: int,
        num_classes: int,
        void: int | None,
        augment: v2.Transform | None,
        unreadable: UnreadableFiles,
        pixels: PixelFormat,
    ) -> None:
        super().__init__(samples, image_size, seed, unreadable, pixels)
        self.masks, self.num_classes, self.void, self.augment = masks, num_classes, void, augment

    def read(self, index: int) -> Any:
        """An image and its mask, as torchvision's transforms take them."""
        image, mask = super().read(index), read_mask(self.masks[index], self.void)
        if image.shape[1:] != mask.shape:
            raise ValueError(f"its mask has {tuple(mask.shape)} pixels, and the image {tuple(image.shape[1:])}")
        if int(mask.max()) >= self.num_classes:
            raise ValueError(f"its mask names class {int(mask.max())} of {self.num_classes}")
        return tv_tensors.Image(image), tv_tensors.Mask(mask)

    def __getitems__(self, items: list[Any]) -> SegmentationBatch | None:
        """The batch named by (epoch, index) pairs in training, by indices in evaluation."""
        if self.augment is not None:
            pairs, _ = augmented(self, items, self.augment)
            return self._collate(pairs, (self.seed, *items[0]))
        whole = [pair for index in items if (pair := self.decode(index)) is not None]
        resized = [(vision.resize(image, list(self.image_size)), self._shrunk(mask)) for image, mask in whole]
        return self._collate(resized, (self.seed, HELD_OUT_STREAM, items[0])) if resized else None

    def _shrunk(self, mask: Tensor) -> Tensor:
        return vision.resize(mask, list(self.image_size), vision.InterpolationMode.NEAREST_EXACT)

    def _collate(self, pairs: Sequence[tuple[Tensor, Tensor]], key: tuple[int, ...]) -> SegmentationBatch:
        images, masks = (torch.stack([part.as_subclass(Tensor) for part in parts]) for parts in zip(*pairs, strict=True))
        return SegmentationBatch(images, masks.long(), key)


class SegmentationFolder(SingleLoaderDataModule):
    """Images and masks of the same names, in root/train/images, root/train/masks, root/val/images and root/val/masks.

    A mask is an image in gray or with a palette, whose numbers are classes. Training pairs are cropped and flipped together,
    those of val are resized; `test` reads what validation reads. A pair that cannot be read is named once and left out.

    Args:
        root: Folder of the images and masks.
        image_size: Height and width in pixels that both are resized to, one number or two. It need not be that of the
            pre-training, but a multiple of its patch size.
        num_classes: Number of classes; found in the training masks if left out, which reads them all once.
        void: Number in the masks of pixels that do not count.
        class_names: Names of the classes for reports.
        crop_scale: Minimum and maximum area of a training crop, as fractions of the image.
        flip: Probability of a horizontal flip in training.
        channels: As for `ImageFolder`.
        value_range: As for `ImageFolder`.
        normalization: As for `ImageFolder`.
        batch_size: Images per batch and process.
        num_workers: Number of processes that decode; 0 decodes in the training process.
        seed: Seed of orders, crops and flips.

    Raises:
        ValueError: A number out of its range, named together with what is allowed.
    """

    batch_type = SegmentationBatch

    def __init__(
        self,
        root: str,
        image_size: int | tuple[int, int],
        num_classes: int | None = None,
        void: int | None = 255,
        class_names: list[str] | None = None,
        crop_scale: tuple[float, float] = (0.5, 1.0),
        flip: float = 0.5,
        channels: int = 3,
        value_range: tuple[float, float] | None = None,
        normalization: Normalization | None = None,
        batch_size: int = 16,
        num_workers: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root = Path(root)
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        if min(self.image_size) < 1 or batch_size < 1 or seed < 0 or num_workers < 0:
            raise ValueError(
                f"data.image_size={image_size}, data.batch_size={batch_size}: both must be at least 1; data.seed={seed} and "
                f"data.num_workers={num_workers} must not be negative."
            )
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"data.num_classes={num_classes}: segmentation needs at least 2 classes.")
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1 or not 0 <= flip <= 1:
            raise ValueError(
                f"data.crop_scale={crop_scale}, data.flip={flip}: give areas 0 < minimum <= maximum <= 1, and a probability."
            )
        check_normalization(channels, normalization)
        self.value_range, self.normalization = value_range, normalization
        self.pixels = PixelFormat(channels).with_range(value_range)
        self.given_classes, self.class_names, self.void = num_classes, class_names, void
        self.crop_scale, self.flip = crop_scale, flip
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.num_classes = num_classes or 0
        self._pairs: dict[str, tuple[Samples, np.ndarray]] = {}
        self._unreadable: dict[str, UnreadableFiles] = {}

    def setup(self, stage: str) -> None:
        """Find the pairs, on rank 0, which broadcasts them.

        Raises:
            FileNotFoundError: A folder is missing.
            ValueError: A folder without images, an image without a mask, or another number of names than classes.
        """
        if self._pairs:
            return
        self._pairs, self.num_classes, self.pixels, said, token = from_rank_zero(self.trainer, self._find)
        for sentence in said:
            rank_zero_info(sentence)
        self._unreadable = {
            split: UnreadableFiles(len(masks), f"{token}-{split}") for split, (_, masks) in self._pairs.items()
        }

    def _find(self) -> tuple[dict[str, tuple[Samples, np.ndarray]], int, PixelFormat, list[str], str]:
        found, said = {}, []
        for split in ("train", "val"):
            paths, others = files_below(self.root / split / "images")
            masks = _masks_of(paths, self.root / split / "images", self.root / split / "masks")
            # In one mixed order: neighbors, as in a film, would show the same in figures.
            order = torch.randperm(len(masks), generator=seeded_generator(self.seed, HELD_OUT_STREAM)).numpy()
            found[split] = (Samples(np.array(paths)[order], torch.full((len(paths),), -1)), masks[order])
            said.append(f"Found {len(masks)} images with masks in {printable(self.root / split)}.")
            if others:
                said.append(f"Left out of {printable(self.root / split / 'images')}: {others.total()} files of other kinds.")
        some = slice(None) if self.given_classes is None else slice(SOME_MASKS)
        classes = self._classes_in(found["train"][1][some].tolist())
        if len(classes) < 2:
            raise ValueError(
                f"The training masks hold no class but {', '.join(map(str, classes)) or 'void'}, and data.void={self.void} "
                "does not count: segmentation needs at least 2. Write 0, 1, ... for the classes, or set data.void to "
                "another number, null for none."
            )
        count = self.given_classes or max(classes) + 1
        said += [] if self.given_classes else [f"The masks name {count} classes."]
        if self.class_names is not None and len(self.class_names) != count:
            raise ValueError(f"data.class_names has {len(self.class_names)} names, and there are {count} classes.")
        images: Any = found["train"][0].paths
        seen = look(images, self.pixels.channels, self.value_range, self.normalization)
        said += [seen.said] if seen.said else []
        return found, count, seen.pixels, said, uuid4().hex

    def _classes_in(self, masks: list[bytes]) -> list[int]:
        """The classes that masks name; those that cannot be read are named when they are to be trained on."""
        found: set[int] = set()
        for path in masks:
            try:
                found |= set(read_mask(path, self.void).unique().tolist())
            except Exception:
                continue
        return sorted(found - {VOID})

    def make_train_loader(self) -> ResumableLoader:
        steps = [v2.RandomResizedCrop(self.image_size, self.crop_scale), v2.RandomHorizontalFlip(self.flip)]
        images = self._images("train", v2.Compose(steps))
        return ResumableLoader(images, self.train_sampler(len(images)), **self.loader_settings())

    def _images(self, split: str, augment: v2.Transform | None) -> SegmentationImages:
        return SegmentationImages(
            *self._pairs[split],
            self.image_size,
            self.seed,
            self.num_classes,
            self.void,
            augment,
            self._unreadable[split],
            self.pixels,
        )

    def order(self) -> dict[str, Any]:
        masks = self._pairs["train"][1].tolist()
        return {
            "images": hashlib.sha256(b"\0".join(os.path.basename(path) for path in masks)).hexdigest(),
            "void": self.void,
            "image_size": self.image_size,
            "crop_scale": self.crop_scale,
            "flip": self.flip,
            "seed": self.seed,
        }

    def val_dataloader(self) -> DataLoader[Any]:
        return held_out_loader(self, "validation", self._images("val", None))

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    def on_after_batch_transfer(self, batch: SegmentationBatch, dataloader_idx: int) -> SegmentationBatch:
        """From uint8 to normalized floats, on the device."""
        batch = batch._replace(images=normalize(batch.images, self.pixels))
        return batch if self.trainer is None else self.trainer.precision_plugin.convert_input(batch)


def _masks_of(images: list[bytes], folder: Path, masks: Path) -> np.ndarray:
    """The mask of each image: the file of the same name in the folder of the masks, whatever its ending.

    Raises:
        FileNotFoundError: There is no folder of masks.
        ValueError: An image has no mask.
    """

    def name(path: bytes, below: Path) -> bytes:
        return os.path.splitext(os.path.relpath(path, os.fsencode(below)))[0]

    there = {name(path, masks): path for path in files_below(masks)[0]}
    names = [name(path, folder) for path in images]
    if missing := [one for one in names if one not in there]:
        raise ValueError(
            f"{len(missing)} of {len(names)} images have no mask in {printable(masks)}, first {printable(missing[0])}: give "
            "each mask the name of its image, or take these images out."
        )
    return np.array([there[one] for one in names])
