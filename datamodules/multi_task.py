"""Several folders of images at once, a task each."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities import CombinedLoader

from datamodules.batches import ImageBatch
from datamodules.image_folder import ImageFolder
from datamodules.pixel_format import PixelFormat
from datamodules.resumable import ResumableDataModule, ResumableLoader


class Passes:
    """A training loader whose every pass is an epoch of its own, also those within an epoch of a longer loader.

    Args:
        loader: Training loader whose orders and crops are functions of its sampler's epoch.
    """

    def __init__(self, loader: ResumableLoader) -> None:
        self.loader, self.started = loader, 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[ImageBatch]:
        self.loader.sampler.set_epoch(self.started)
        self.started += 1
        return iter(self.loader)

    def start_at(self, epoch: int, batch: int, batches_per_epoch: int) -> None:
        """Go on as if so many epochs and batches of the longest loader lay behind."""
        self.started = epoch * math.ceil(batches_per_epoch / len(self)) + batch // len(self)
        self.loader.start_at(batch % len(self))

    def state_dict(self) -> dict[str, int]:
        """Nothing, see `ResumableLoader`."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing, see `ResumableLoader`."""


class MultiTask(ResumableDataModule):
    """Train on several labeled folders side by side: a batch of each at every step, by name.

    An epoch is as long as that of the largest; the others start again, in another order and with other crops. Validation and
    test see one after the other. A run that was cut goes on where it was.

    Args:
        folders: Task -> its images, all of one size. A name is a word of letters, digits and underscores.

    Raises:
        ValueError: Fewer than two tasks, a name that is no word, images of several sizes or channels, or folders with views.
    """

    batch_type = ImageBatch

    def __init__(self, folders: dict[str, ImageFolder]) -> None:
        super().__init__()
        if len(folders) < 2:
            raise ValueError(f"data.folders has {len(folders)} task(s): give two or more, or use ImageFolder alone.")
        if odd := [name for name in folders if not name.isidentifier()]:
            raise ValueError(f"data.folders: {odd[0]!r} is no name for a task; use letters, digits and underscores.")
        sizes = {name: folder.image_size for name, folder in folders.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"data.folders: one network reads images of one size, but image_size is {sizes}.")
        channels = {name: folder.pixels.channels for name, folder in folders.items()}
        if len(set(channels.values())) > 1:
            raise ValueError(f"data.folders: one network reads images of as many channels, but channels is {channels}.")
        if any(folder.views is not None for folder in folders.values()):
            raise ValueError("data.folders: tasks have labels, not views; leave data.views out.")
        self.folders = folders
        self._passes: dict[str, Passes] = {}
        self.batch_size = sum(folder.batch_size for folder in folders.values())
        self.image_size = next(iter(sizes.values()))

    @property
    def pixels(self) -> PixelFormat:
        """Format that the images are read in: that of the first folder, unless a model has set its own for all."""
        return next(iter(self.folders.values())).pixels

    @pixels.setter
    def pixels(self, pixels: PixelFormat) -> None:
        for folder in self.folders.values():
            folder.pixels = pixels.with_range(folder.value_range)

    @property
    def num_classes(self) -> dict[str, int]:
        """Number of classes by task."""
        return {name: folder.num_classes for name, folder in self.folders.items()}

    def prepare_data(self) -> None:
        """Download what is asked for by name and not there."""
        for folder in self.folders.values():
            folder.prepare_data()

    def setup(self, stage: str) -> None:
        """Find the images; see `ImageFolder` for the errors.

        All are read alike: normalized as those of the first folder, and by the range of the first that has one.
        """
        first: PixelFormat | None = None
        for folder in self.folders.values():
            folder.trainer = self.trainer
            folder.setup(stage)
            found = first or folder.pixels
            integers, floats = found.integers or folder.pixels.integers, found.floats or folder.pixels.floats
            first = replace(found, integers=integers, floats=floats)
        assert first is not None
        self.pixels = first

    def make_train_loaders(self) -> dict[str, Passes]:
        """The loader of each task."""
        return {name: Passes(folder.make_train_loader()) for name, folder in self.folders.items()}

    def train_dataloader(self) -> CombinedLoader:
        self._passes, length = self.make_train_loaders(), self.batches_per_epoch()
        for passes in self._passes.values():
            passes.start_at(*self.resumed, length)
        return CombinedLoader(self._passes, "max_size_cycle")

    def shut_down(self) -> None:
        for passes in self._passes.values():
            passes.loader.shut_down()

    def epoch_length(self) -> int:
        return max(len(passes) for passes in self.make_train_loaders().values())

    def order(self) -> dict[str, Any]:
        return {name: folder.order() for name, folder in self.folders.items()}

    def val_dataloader(self) -> dict[str, Any]:
        return {name: folder.val_dataloader() for name, folder in self.folders.items()}

    def test_dataloader(self) -> dict[str, Any]:
        return self.val_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """From uint8 to normalized floats, on the device; in training a dictionary of batches."""
        if isinstance(batch, ImageBatch):
            return next(iter(self.folders.values())).on_after_batch_transfer(batch, dataloader_idx)
        return {name: self.folders[name].on_after_batch_transfer(part, dataloader_idx) for name, part in batch.items()}
