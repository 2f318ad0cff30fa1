"""Folders of images as a data module: ImageNet's layout, or any other folder."""

import warnings
from pathlib import Path
from uuid import uuid4

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from datamodules.downloads import SOURCES, DatasetName, download
from datamodules.first_look import Normalization
from datamodules.image_data import ImageDataModule
from datamodules.image_files import Samples, Scan, describe, scan
from datamodules.image_split import all_images, split_images, training_folder
from datamodules.rank_zero import from_rank_zero
from datamodules.views import Views


class ImageFolder(ImageDataModule):
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
        image_size: Height and width in pixels, one number or two; null chooses 32, 64, 96 or 128 by the images, the largest
            that half of them have.
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
            a page for each. Colors of views change with 3 channels alone.
        value_range: Values that are black and white in images of more than 8 bits. By default they are found: white is the
            largest number of as many bits as are in use, of floats 1 or the largest value.
        normalization: "imagenet" for the mean and standard deviation of ImageNet, "found" for those of the images; by
            default ImageNet's for 3 channels. A model from a checkpoint keeps the range and normalization of its training.
        rand_augment: Whether to apply two random distortions per training image (RandAugment, Cubuk et al. 2020; images of 3
            channels).
        views: Settings of pairs of views and the action that leads from one to the other, which IWM needs, and IJEPA with
            `view_weight`; see `datamodules.views.Views`. Plain images if left out.
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
        image_size: int | tuple[int, int] | None = 224,
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
            prefetch_factor=prefetch_factor,
            timeout=timeout,
            seed=seed,
        )
        self.root = Path(root)
        if not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction={val_fraction}: choose a fraction in (0, 1) to hold out.")
        if not 0 < fraction <= 1:
            raise ValueError(f"data.fraction={fraction}: choose a fraction of each class in (0, 1].")
        if download is not None and download not in SOURCES:
            raise ValueError(f"data.download={download!r}: choose one of {', '.join(SOURCES)}.")
        self.val_fraction, self.fraction, self.file_list, self.download = val_fraction, fraction, file_list, download

    def prepare_data(self) -> None:
        """Download the images, if they are asked for by name and not there."""
        if self.download is not None:
            download(self.download, self.root)

    def training_paths(self) -> np.ndarray:
        self.prepare_data()
        return scan(training_folder(self.root)).samples.paths

    def find(self, stage: str) -> tuple[dict[str, Samples], list[str], str]:
        """The images, found on rank 0, which broadcasts them: so all ranks have the same files in the same order.

        Raises:
            FileNotFoundError: A folder, a list or an image of it is missing.
            ValueError: No images, an empty class, classes that differ between training and validation, or a list that
                leads out of the folder.
        """
        find = self._find if stage != "predict" else lambda: all_images(self.root, self._scan)
        return from_rank_zero(self.trainer, find)

    def _find(self) -> tuple[dict[str, Samples], list[str], str]:
        """The samples by split, the names of the classes, and what names this run's flags of unreadable files."""
        file_list = None if self.file_list is None else Path(self.file_list)
        found, classes, alone = split_images(self.root, self.val_fraction, self.fraction, file_list, self.seed, self._scan)
        if alone:
            rank_zero_info(f"{alone} of {len(classes)} classes have one image each, which is not held out.")
        return found, classes, uuid4().hex

    def _scan(self, folder: Path, classes: list[str] | None = None) -> Scan:
        """What a folder holds, which is also said."""
        found = scan(folder, classes)
        holds, left_out = describe(folder, found)
        rank_zero_info(holds)
        if left_out:
            warnings.warn(left_out, stacklevel=2)
        return found
