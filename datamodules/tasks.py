"""Several folders of pictures at once, a task each."""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader

from datamodules.batches import ImageBatch
from datamodules.image_folder import ImageFolder
from datamodules.resumable import ResumableLoader


class Passes:
    """A training loader whose every pass is an epoch of its own, also those within an epoch of a longer loader.

    Args:
        loader: Whose orders and crops are functions of its sampler's epoch.
    """

    def __init__(self, loader: ResumableLoader) -> None:
        self.loader, self.started = loader, 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[ImageBatch]:
        self.loader.sampler.set_epoch(self.started)
        self.started += 1
        return iter(self.loader)

    def state_dict(self) -> dict[str, int]:
        """Passes that were started, and batches handed out in the last one."""
        return {"started": self.started, **self.loader.state_dict()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next pass after the batches that were handed out; a finished pass is followed by the next."""
        self.loader.load_state_dict({"taken": state["taken"]})
        self.started = state["started"] - (state["taken"] % len(self.loader) > 0)


class Tasks(LightningDataModule):
    """Train on several labelled folders side by side: a batch of each at every step, by name.

    An epoch is as long as that of the largest; the others start again, in another order and with other crops. Validation and
    test see one after the other. A run that was cut goes on where it was.

    Args:
        folders: Task -> its pictures, all of one size. A name is a word of letters, digits and underscores.

    Raises:
        ValueError: Fewer than two tasks, a name that is no word, pictures of several sizes, or folders with views.
    """

    def __init__(self, folders: dict[str, ImageFolder]) -> None:
        super().__init__()
        if len(folders) < 2:
            raise ValueError(f"data.folders has {len(folders)} task(s): give two or more, or use ImageFolder alone.")
        if odd := [name for name in folders if not name.isidentifier()]:
            raise ValueError(f"data.folders: {odd[0]!r} is no name for a task; use letters, digits and underscores.")
        sizes = {name: folder.image_size for name, folder in folders.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"data.folders: one network reads pictures of one size, but image_size is {sizes}.")
        if any(folder.views is not None for folder in folders.values()):
            raise ValueError("data.folders: tasks have labels, not views; leave data.views out.")
        self.folders = folders
        self._passes: dict[str, Passes] = {}
        self._resumed: dict[str, Any] = {}
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
        self._passes = {name: Passes(folder.make_train_loader()) for name, folder in self.folders.items()}
        for name, state in self._resumed.items():
            self._passes[name].load_state_dict(state)
        self._resumed = {}
        return CombinedLoader(self._passes, "max_size_cycle")

    def state_dict(self) -> dict[str, Any]:
        """The position in each folder, for the checkpoint."""
        return {name: passes.state_dict() for name, passes in self._passes.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict

    def val_dataloader(self) -> dict[str, Any]:
        return {name: folder.val_dataloader() for name, folder in self.folders.items()}

    def test_dataloader(self) -> dict[str, Any]:
        return self.val_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """From uint8 to normalised floats, on the device; in training a dictionary of batches."""
        if isinstance(batch, ImageBatch):
            return next(iter(self.folders.values())).on_after_batch_transfer(batch, dataloader_idx)
        return {name: self.folders[name].on_after_batch_transfer(part, dataloader_idx) for name, part in batch.items()}
