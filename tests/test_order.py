"""In which order training samples come: mixed, anew in each epoch, all of them once."""

from pathlib import Path

import pytest
import torch
from conftest import small_data, small_images
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.resumable import EpochBatches


def order(sampler: EpochBatches, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert all(number == epoch for batch in batches for number, _ in batch), "samples are drawn by the epoch"
    return [index for batch in batches for _, index in batch]


def test_the_order_is_mixed_and_another_in_each_epoch() -> None:
    sampler = EpochBatches(1000, 10, seed=0)
    orders = torch.tensor([order(sampler, epoch) for epoch in range(5)], dtype=torch.float64)
    places = torch.arange(1000, dtype=torch.float64)
    # Ranks that have nothing to do with each other correlate by 0.03 or so, and never by 0.15.
    correlations = torch.corrcoef(torch.cat([places[None], orders])) - torch.eye(6, dtype=torch.float64)
    assert correlations.abs().max() < 0.15, "neither sorted nor alike"
    assert (orders.diff(dim=1) == 1).double().mean() < 0.02, "neighbors do not stay together"
    assert orders[0].tolist() != [float(index) for index in order(EpochBatches(1000, 10, seed=1), 0)]


@pytest.mark.parametrize("kind", ["pendulum", "images"])
def test_training_loaders_mix_and_cover_their_samples(kind: str, image_root: Path) -> None:
    data = small_data(batch_size=3) if kind == "pendulum" else small_images(image_root, batch_size=3)
    data.setup("fit")
    sampler = data.make_train_loader().sampler
    first, second = order(sampler, 0), order(sampler, 1)
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != sorted(first) and second != sorted(second) and first != second


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    batch_size=st.integers(1, 5), ranks=st.integers(1, 4), more=st.integers(0, 40), seed=st.integers(0, 99), data=st.data()
)
def test_processes_share_an_epoch_and_leave_less_than_a_batch(batch_size, ranks, more, seed, data) -> None:
    samples = batch_size * ranks + more
    epoch = data.draw(st.integers(0, 50))
    parts = [order(EpochBatches(samples, batch_size, seed, rank, ranks), epoch) for rank in range(ranks)]
    seen = [index for part in parts for index in part]
    assert len(set(seen)) == len(seen) and set(seen) <= set(range(samples))
    assert samples - len(seen) < batch_size * ranks
    assert len({len(part) for part in parts}) == 1, "no process waits for another"


def test_settings_reach_the_training_loader(image_root: Path) -> None:
    data = small_images(image_root, num_workers=2, prefetch_factor=3, timeout=7.0)
    data.setup("fit")
    loader = data.make_train_loader().loader
    assert (loader.num_workers, loader.prefetch_factor, loader.timeout) == (2, 3, 7.0)
