"""A training loader that can stop in the middle of an epoch and go on from there, bit for bit."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, Dataset

from datamodules.randomness import seeded_generator


class EpochBatches:
    """Batch sampler: which samples, in which order, as a pure function of (seed, epoch, rank).

    All ranks cut their batches from one permutation, so batch n of all ranks together is batch n of a single process
    with the global batch size. The last, incomplete global batch is dropped.

    Args:
        num_samples: Size of the data set.
        batch_size: Per rank.
        seed: Of the permutations.
        rank: Of this process.
        num_ranks: Number of processes.

    Raises:
        ValueError: Fewer samples than one global batch.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, rank: int = 0, num_ranks: int = 1) -> None:
        if num_samples < batch_size * num_ranks:
            raise ValueError(
                f"{num_samples} training samples do not fill one batch of batch_size={batch_size} on {num_ranks} "
                "process(es). Generate more (data.size) or lower data.batch_size."
            )
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.num_ranks = rank, num_ranks
        self.epoch = 0
        self.first_batch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples // (self.batch_size * self.num_ranks)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield lists of (epoch, index): the data set may draw its own randomness from the two."""
        order = torch.randperm(self.num_samples, generator=seeded_generator(self.seed, self.epoch))
        batches = order[: len(self) * self.batch_size * self.num_ranks].view(-1, self.num_ranks, self.batch_size)
        for batch in batches[self.first_batch :, self.rank].tolist():
            yield [(self.epoch, index) for index in batch]


class ResumableLoader:
    """A DataLoader with a `state_dict`, which Lightning saves in each checkpoint and restores on `--ckpt_path`.

    What is saved is the number of batches handed out in this epoch. Batches that workers have prepared but nobody has
    taken do not count, and because the samples are a function of (seed, epoch, index) the number of workers is free to
    change.

    Args:
        dataset: With a `__getitems__` that takes a list of (epoch, index) and returns a collated batch.
        sampler: Order of the samples.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
        pin_memory: Put batches into page-locked memory, for faster copies to a GPU.
    """

    def __init__(self, dataset: Dataset[Any], sampler: EpochBatches, num_workers: int = 0, pin_memory: bool = False) -> None:
        self.sampler = sampler
        self.loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=already_collated,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )
        self._taken = 0
        self._resume_at = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        self._taken = self.sampler.first_batch = self._resume_at
        self._resume_at = 0
        for batch in self.loader:
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The number of batches handed out in this epoch."""
        return {"taken": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next iteration after the batches that were handed out; a finished epoch starts anew."""
        self._resume_at = state["taken"] % len(self)


def already_collated(batch: Any) -> Any:
    """What a data set with `__getitems__` returns is a batch already."""
    return batch


class ResumableDataModule(LightningDataModule, ABC):
    """A data module whose training loader goes on in the middle of an epoch, and which knows its place among processes.

    Lightning saves and restores the position of a loader too, but not if anything has asked for the number of training
    steps before (2.6.6: `estimated_stepping_batches` sets the loader up without its state). So the data module carries it.
    """

    _train_loader: ResumableLoader | None = None
    _resumed_state: dict[str, Any] | None = None

    def train_dataloader(self) -> ResumableLoader:
        self._train_loader = self.make_train_loader()
        if self._resumed_state:
            self._train_loader.load_state_dict(self._resumed_state)
            self._resumed_state = None
        return self._train_loader

    @abstractmethod
    def make_train_loader(self) -> ResumableLoader:
        """The loader of this process's share of the training samples."""

    def state_dict(self) -> dict[str, Any]:
        """The position in the epoch, for the checkpoint."""
        return {} if self._train_loader is None else self._train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed_state = state_dict

    @property
    def rank(self) -> tuple[int, int]:
        """This process's rank and the number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    @property
    def on_gpu(self) -> bool:
        """Whether batches will be copied to a GPU."""
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def held_out_sampler(self, split: str, samples: Dataset[Any]) -> UnrepeatedDistributedSampler:
        """Every sample once, in order. Processes take turns, and none sees one twice.

        Lightning would put a sampler of its own on a loader without a distributed one, and pad the last batch with
        repeated samples.

        Raises:
            ValueError: Fewer samples than processes.
        """
        rank, num_ranks = self.rank
        if len(samples) < num_ranks:  # type: ignore[arg-type]
            raise ValueError(f"{len(samples)} {split} samples leave some of {num_ranks} processes without data.")  # type: ignore[arg-type]
        return UnrepeatedDistributedSampler(samples, num_replicas=num_ranks, rank=rank, shuffle=False)
