"""Embeddings of the training images, as validation would see them: each process encodes its share."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Subset

from datamodules.held_out import HeldOutLoader
from jepa_lightning.probes.images.base import ImageProbe


def share_of(loader: DataLoader[Any], rank: int, num_ranks: int) -> DataLoader[Any]:
    """A loader of every num_ranks-th sample of another one, in order: the shares of all ranks are all samples, once each.

    Raises:
        ValueError: Fewer samples than processes.
    """
    count = len(loader.dataset)  # type: ignore[arg-type]
    if count < num_ranks:
        raise ValueError(f"{count} training images leave some of {num_ranks} processes without any: use fewer devices.")
    return HeldOutLoader(
        Subset(loader.dataset, range(rank, count, num_ranks)),
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        timeout=loader.timeout,
        prefetch_factor=loader.prefetch_factor,
    )


def training_share(probe: ImageProbe) -> DataLoader[Any]:
    """This process's share of the training images, uncropped."""
    data: Any = probe.trainer.datamodule
    return share_of(data.plain_train_dataloader(), probe.trainer.global_rank, probe.trainer.world_size)


def encoded(probe: Any, loader: DataLoader[Any]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """What a probe's `features` makes of each batch, by kind of features (B, width), and classes (B,)."""
    data = probe.trainer.datamodule
    for batch in loader:
        batch = data.on_after_batch_transfer(data.transfer_batch_to_device(batch, probe.device, 0), 0)
        with probe.trainer.precision_plugin.test_step_context():
            features = probe.features(batch.images)
        yield features, batch.labels
