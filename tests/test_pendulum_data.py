"""The data module: splits, clips, windows, ranks and a loader that resumes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_data, small_driven_data, small_driven_model, trainer
from lightning.pytorch import Callback, Trainer

from datamodules import ClipBatch
from datamodules.physics import Pendulum
from datamodules.rendering import render
from datamodules.resumable import EpochBatches


def test_splits_share_no_trajectory_and_seeds_give_others() -> None:
    data = small_data(size=50, val_size=50, test_size=50)
    starts = {split: data.trajectories(split)[:, 0] for split in ("train", "val", "test")}
    everything = torch.cat([*starts.values(), small_data(size=50, seed=1).trajectories("train")[:, 0]])
    assert len(torch.unique(everything, dim=0)) == 200
    assert torch.equal(data.trajectories("train"), small_data(size=50).trajectories("train"))


def test_trajectories_are_the_physics_of_the_arguments() -> None:
    data = small_data(masses=(2.0, 1.0), lengths=(0.5, 1.0), gravity=3.0, test_sequence_length=20)
    found = data.trajectories("test").double()
    assert found.shape == (3, 20, 4)
    expected = Pendulum((2.0, 1.0), (0.5, 1.0), 3.0).simulate(found[:, 0], 20)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("history", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_windows_of_pixels_are_the_drawn_frames(history: int, channels: int) -> None:
    data = small_data(observation="pixels", image_size=32, history=history, channels=channels)
    states = data.trajectories("train")[:2, :6]
    batch = data.observe(states)
    frames = render(states, 32, channels=channels)
    assert batch.observations.shape == (2, 7 - history, history * channels, 32, 32)
    for window in range(7 - history):
        expected = frames[:, window : window + history].flatten(1, 2)
        assert torch.equal(batch.observations[:, window], expected)
    assert torch.equal(batch.states, states[:, history - 1 :])  # the state of the newest frame


def test_windows_of_coordinates_are_positions() -> None:
    data = small_data()
    states = data.trajectories("train")[:2, :5]
    positions = Pendulum().positions(states)
    batch = data.observe(states)
    assert torch.equal(batch.observations[:, 1], torch.cat([positions[:, 1], positions[:, 2]], dim=-1))


def test_every_frame_of_a_trajectory_occurs_in_some_clip() -> None:
    data = small_data(size=300, sequence_length=10, clip_length=4, batch_size=300)
    loader = data.train_dataloader()
    clips = next(iter(loader)).view(torch.float32)
    trajectories = data.trajectories("train")
    order = [index for batch in loader.sampler for _, index in batch]
    first = (trajectories[order] == clips[:, :1]).all(-1).int().argmax(1)
    assert sorted(set(first.tolist())) == [0, 1, 2, 3, 4, 5, 6]


def test_order_and_clips_change_with_the_epoch_and_repeat_with_the_seed() -> None:
    def epoch(number: int, **changes: int) -> torch.Tensor:
        loader = small_data(**changes).train_dataloader()
        loader.sampler.set_epoch(number)
        return torch.cat(list(loader))

    assert torch.equal(epoch(3), epoch(3))
    assert torch.equal(epoch(3), epoch(3, num_workers=2))
    assert not torch.equal(epoch(3), epoch(4))
    assert not torch.equal(epoch(3), epoch(3, seed=1))


def test_ranks_cut_one_global_batch_without_overlap() -> None:
    whole = list(EpochBatches(32, 8, seed=0))
    parts = [list(EpochBatches(32, 4, seed=0, rank=rank, num_ranks=2)) for rank in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    assert len({index for batch in whole for _, index in batch}) == 32


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_goes_on_where_it_stopped(num_workers: int) -> None:
    loader = small_data(num_workers=num_workers).train_dataloader()
    loader.sampler.set_epoch(5)
    whole = list(loader)
    resumed = small_data(num_workers=2 - num_workers).train_dataloader()
    resumed.start_at(2)
    resumed.sampler.set_epoch(5)
    rest = list(resumed)
    assert torch.equal(torch.cat(rest), torch.cat(whole[2:]))
    assert len(list(resumed)) == len(whole)  # the next epoch is whole again
    for used in (loader, resumed):
        used.shut_down()
        assert used.loader._iterator is None


def test_held_out_data_is_seen_once_and_in_order() -> None:
    data = small_data(val_size=6)
    assert torch.equal(torch.cat(list(data.val_dataloader())).view(torch.float32), data.trajectories("val"))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_narrow_networks_see_exact_drawings_rounded_once(tmp_path: Path, split: str) -> None:
    class Record(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: Any, batch: ClipBatch, *_: Any) -> None:
            self.seen = batch

        on_validation_batch_start = on_predict_batch_start = on_train_batch_start

    data, record = small_driven_data(observation="pixels", image_size=16), Record()
    model = small_driven_model(observation="pixels", image_size=16, encoder_widths=(4,))
    run = trainer(tmp_path, callbacks=[record], max_steps=1, precision="bf16-true", limit_val_batches=int(split == "val"))
    getattr(run, {"train": "fit", "val": "validate", "test": "predict"}[split])(model, datamodule=data)
    if split == "train":
        data.trainer = None
        exact = data.observe(next(iter(data.train_dataloader())))
    else:
        exact = data.observe(data.trajectories(split)[:4])
    assert record.seen.observations.dtype == record.seen.actions.dtype == torch.bfloat16
    assert torch.equal(record.seen.observations, exact.observations.bfloat16())
    assert torch.equal(record.seen.actions, exact.actions.bfloat16())
    assert torch.equal(record.seen.states, exact.states)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "data.size=0"),
        ({"val_size": -1}, "data.val_size=-1"),
        ({"history": 0}, "data.history=0"),
        ({"sequence_length": 2}, "data.sequence_length=2: must be at least history=2 plus stride=1"),
        ({"clip_length": 11}, "data.clip_length=11"),
        ({"clip_length": 2}, "data.clip_length=2"),
        ({"image_size": 4}, "image_size=4"),
        ({"channels": 2}, "channels=2"),
        ({"observation": "sound"}, "data.observation='sound'"),
        ({"seed": -1}, "data.seed=-1"),
        ({"gravity": float("nan")}, "gravity=nan"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_data(**change)


def test_fewer_trajectories_than_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fill one batch of batch_size=4"):
        small_data(size=3).train_dataloader()
