"""Several folders of pictures at once, a task each."""

from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader

from datamodules.batches import ImageBatch
from datamodules.image_folder import ImageFolder


class Tasks(LightningDataModule):
    """Train on several labelled folders side by side: a batch of each at every step, by name.

    An epoch is as long as that of the largest; the others start again. Validation and test see one after the other. A run
    that was cut starts its epoch again.

    Args:
        folders: Task -> its pictures, all of one size.

    Raises:
        ValueError: Fewer than two tasks, pictures of several sizes, or folders with views.
    """

    def __init__(self, folders: dict[str, ImageFolder]) -> None:
        super().__init__()
        if len(folders) < 2:
            raise ValueError(f"data.folders has {len(folders)} task(s): give two or more, or use ImageFolder alone.")
        sizes = {name: folder.image_size for name, folder in folders.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"data.folders: one network reads pictures of one size, but image_size is {sizes}.")
        if any(folder.views is not None for folder in folders.values()):
            raise ValueError("data.folders: tasks have labels, not views; leave data.views out.")
        self.folders = folders
        self.image_size = next(iter(sizes.values()))

    @property
    def num_classes(self) -> dict[str, int]:
        """Number of classes by task."""
        return {name: folder.num_classes for name, folder in self.folders.items()}

    def prepare_data(self) -> None:
        """Download what is asked for by name and not there."""
        for folder in self.folders.values():
            folder.prepare_data()

    def setup(self, stage: str) -> None:
        """Find the pictures; see `ImageFolder` for the errors."""
        for folder in self.folders.values():
            folder.trainer = self.trainer
            folder.setup(stage)

    def train_dataloader(self) -> CombinedLoader:
        loaders = {name: folder.train_dataloader() for name, folder in self.folders.items()}
        return CombinedLoader(loaders, "max_size_cycle")

    def val_dataloader(self) -> dict[str, Any]:
        return {name: folder.val_dataloader() for name, folder in self.folders.items()}

    def test_dataloader(self) -> dict[str, Any]:
        return self.val_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """From uint8 to normalised floats, on the device; in training a dictionary of batches."""
        if isinstance(batch, ImageBatch):
            return next(iter(self.folders.values())).on_after_batch_transfer(batch, dataloader_idx)
        return {name: self.folders[name].on_after_batch_transfer(part, dataloader_idx) for name, part in batch.items()}
