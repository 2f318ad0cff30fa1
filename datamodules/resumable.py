"""Training data that can be left in the middle of an epoch and taken up again, bit for bit."""

import json
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from datamodules.loop_progress import Progress, progress, put
from datamodules.rng import seeded_generator

WORKER_GRACE_SECONDS = 30
"""How long a worker that was asked to end goes on, so that the training process can finish its batch and save."""


class EpochBatches:
    """Batch sampler: which samples, in which order, as a pure function of (seed, epoch, rank).

    All ranks cut their batches from one permutation, so batch n of all ranks together is batch n of a single process
    with the global batch size. The last, incomplete global batch is dropped.

    Args:
        num_samples: Number of samples of the data set.
        batch_size: Samples per batch and rank.
        seed: Seed of the permutations.
        rank: Rank of this process.
        num_ranks: Number of processes.
        repeat: Whether every epoch is the first one again, as `overfit_batches` wants it.

    Raises:
        ValueError: Fewer samples than one global batch.
    """

    def __init__(
        self, num_samples: int, batch_size: int, seed: int, rank: int = 0, num_ranks: int = 1, repeat: bool = False
    ) -> None:
        if num_samples < batch_size * num_ranks:
            raise ValueError(
                f"{num_samples} training samples do not fill one batch of batch_size={batch_size} on {num_ranks} "
                "process(es). Generate more (data.size) or lower data.batch_size."
            )
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.num_ranks, self.repeat = rank, num_ranks, repeat
        self.epoch = 0
        self.first_batch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        self.epoch = 0 if self.repeat else epoch

    def __len__(self) -> int:
        return self.num_samples // (self.batch_size * self.num_ranks)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield lists of (epoch, index): the data set may draw its own randomness from the two."""
        order = torch.randperm(self.num_samples, generator=seeded_generator(self.seed, self.epoch))
        batches = order[: len(self) * self.batch_size * self.num_ranks].view(-1, self.num_ranks, self.batch_size)
        for batch in batches[self.first_batch :, self.rank].tolist():
            yield [(self.epoch, index) for index in batch]


class ResumableLoader:
    """A DataLoader whose next pass can start at any batch.

    The samples are a function of (seed, epoch, index), so the number of workers is free to change between two passes of a
    run, and batches that workers have prepared but nobody has taken are made again.

    Args:
        dataset: Data set with a `__getitems__` that takes a list of (epoch, index) and returns a collated batch.
        sampler: Order of the samples.
        settings: Further arguments of the DataLoader, see `ResumableDataModule.loader_settings`.
    """

    def __init__(self, dataset: Dataset[Any], sampler: EpochBatches, **settings: Any) -> None:
        self.sampler = sampler
        self.loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=already_collated, **settings)
        self._first_batch = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        self.sampler.first_batch, self._first_batch = self._first_batch, 0
        yield from self.loader

    def start_at(self, batch: int) -> None:
        """Leave out the first batches of the next pass."""
        self._first_batch = batch

    def shut_down(self) -> None:
        """End the workers now, as Lightning does for the loaders that it knows: Python's exit would wait for them."""
        if self.loader._iterator is not None:
            self.loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
            self.loader._iterator = None

    def state_dict(self) -> dict[str, int]:
        """Nothing: the data module knows the place. Lightning warns of loaders without this method."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing, see `state_dict`."""


def already_collated(batch: Any) -> Any:
    """What a data set with `__getitems__` returns is a batch already."""
    return batch


def outlive_signals(worker: int) -> None:
    """Let a worker live on when all processes of a job are asked to end: the training process finishes its batch first.

    Ctrl-C and batch systems signal every process of a job. A worker without a task ends with its loader, and one that
    hangs is ended by the alarm.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE_SECONDS))


class ResumableDataModule(LightningDataModule, ABC):
    """A data module that can go on in the middle of an epoch, and which knows its place among processes.

    A checkpoint holds how many samples of the epoch went through an optimizer step, over all processes, and what their
    order depends on. (Lightning saves and restores the position of a loader too, but counts what was loaded, and
    forgets it if anything has asked for the number of training steps before.)

    """

    batch_size: int
    resumed = Progress(0, 0)
    """Where this run was put when it was resumed."""

    def on_exception(self, exception: BaseException) -> None:
        self.shut_down()

    def teardown(self, stage: str) -> None:
        self.shut_down()

    @abstractmethod
    def shut_down(self) -> None:
        """End the workers of the training loader."""

    @abstractmethod
    def train_dataloader(self) -> Any:
        """The loader of this process's share of the training samples, which starts at `resumed`."""

    @abstractmethod
    def epoch_length(self) -> int:
        """Training batches of an epoch, if the Trainer does not limit them."""

    @abstractmethod
    def order(self) -> dict[str, Any]:
        """What order and content of the training samples depend on, by the names of arguments: what JSON can hold."""

    @property
    def samples_per_batch(self) -> int:
        """Samples of all processes in a batch."""
        return self.batch_size * self.rank[1]

    def batches_per_epoch(self) -> int:
        """Training batches of an epoch, limited as the Trainer limits them."""
        length, limit = self.epoch_length(), 1.0 if self.trainer is None else self.trainer.limit_train_batches
        return min(length, limit) if isinstance(limit, int) else int(length * limit)

    def state_dict(self) -> dict[str, Any]:
        """The position in the epoch and what it depends on, for the checkpoint."""
        trainer = self.trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return {}
        epoch, batches = progress(trainer, self.resumed)
        return {
            "epoch": epoch,
            "samples": batches * self.samples_per_batch,
            "samples_per_step": self.samples_per_batch * trainer.accumulate_grad_batches,
            "order": json.loads(json.dumps(self.order())),  # tuples and lists are the same, before and after
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written, at the same sample, if this is a training run.

        Raises:
            ValueError: Optimizer steps of another number of samples, over which the schedules would no longer fit.
        """
        trainer = self.trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        loaded, accumulated = trainer._checkpoint_connector._loaded_checkpoint, trainer.accumulate_grad_batches
        now = self.samples_per_batch * accumulated
        if "samples" not in state_dict:
            rank_zero_warn("This checkpoint of an earlier version does not count samples: the epoch under way starts anew.")
            state_dict = {"epoch": loaded["epoch"], "samples": 0, "samples_per_step": now, "order": self.order()}
        before = state_dict["samples_per_step"]
        if before != now:
            raise ValueError(
                f"An optimizer step of this run was on {before} samples, and now it would be on {now} (data.batch_size="
                f"{self.batch_size} x {self.rank[1]} process(es) x trainer.accumulate_grad_batches={accumulated}): its "
                f"schedules count optimizer steps. Choose the three so that their product is {before}."
            )
        epoch, batches = state_dict["epoch"], state_dict["samples"] // self.samples_per_batch
        if batches >= self.batches_per_epoch():  # of fewer batches than before
            epoch, batches = epoch + 1, 0
        was, order = (json.loads(json.dumps(of)) for of in (state_dict["order"], self.order()))
        changed = [f"data.{name} was {was.get(name)} and is {order[name]}" for name in order if order[name] != was.get(name)]
        if changed:
            rank_zero_warn(
                f"This run goes on with other samples: {'; '.join(changed)}. It is no longer the run that was cut"
                + (", and the epoch under way starts anew." if batches else ".")
            )
            batches = 0
        self.resumed = Progress(epoch, batches)
        put(loaded["loops"], self.resumed, accumulated)

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


class SingleLoaderDataModule(ResumableDataModule):
    """A resumable data module with one training loader. A subclass has the attributes below."""

    num_workers: int
    seed: int
    prefetch_factor: int | None = None
    timeout: float = 0

    @abstractmethod
    def make_train_loader(self) -> ResumableLoader:
        """The loader of this process's share of the training samples, from the start of an epoch."""

    _train_loader: ResumableLoader | None = None

    def train_dataloader(self) -> ResumableLoader:
        self._train_loader = self.make_train_loader()
        self._train_loader.start_at(self.resumed.batches)
        return self._train_loader

    def shut_down(self) -> None:
        if self._train_loader is not None:
            self._train_loader.shut_down()

    def epoch_length(self) -> int:
        return len(self.make_train_loader())

    def train_sampler(self, num_samples: int) -> EpochBatches:
        """The order of this process's share of so many samples."""
        repeat = self.trainer is not None and self.trainer.overfit_batches > 0
        return EpochBatches(num_samples, self.batch_size, self.seed, *self.rank, repeat=repeat)

    def loader_settings(self) -> dict[str, Any]:
        """How batches are made and handed over: arguments of every DataLoader.

        Workers live as long as their loader, not an epoch: to start twelve of them takes a second.
        """
        workers: dict[str, Any] = {"num_workers": self.num_workers, "pin_memory": self.on_gpu}
        if self.num_workers:
            workers |= {"persistent_workers": True, "prefetch_factor": self.prefetch_factor, "timeout": self.timeout}
            workers |= {"worker_init_fn": outlive_signals}
        return workers
