"""The double pendulum as a data module: generated in a second, kept as states, drawn on the device.

10,000 trajectories of 30 frames are 5 MB of states and would be 5 GB of images, while drawing a batch costs a few
per cent of a training step. So nothing is cached on disk, and nothing can go stale.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.batches import ClipBatch
from datamodules.physics import Pendulum, sample_initial_states
from datamodules.rendering import check_image, render
from datamodules.resumable import ResumableLoader, SingleLoaderDataModule
from datamodules.rng import seeded_generator
from datamodules.torques import actuated_trajectories

SPLITS = ("train", "val", "test")
CLIP_STREAM = len(SPLITS)  # the seed's fourth use: where a clip starts


def as_bits(frames: Tensor) -> Tensor:
    """float32 as int32 of the same bits, which no precision plugin rounds on the way to the device."""
    return frames.view(torch.int32)


class Clips(Dataset[Tensor]):
    """Random clips of trajectories. Where a clip starts is a function of (seed, epoch, index).

    Args:
        trajectories: Trajectories (N, T, 4 or 6), see `DoublePendulum.trajectories`.
        length: Frames per clip.
        stride: Clips start at multiples of this number of frames.
        seed: Seed of the random starts.
    """

    def __init__(self, trajectories: Tensor, length: int, stride: int, seed: int) -> None:
        self.trajectories, self.length, self.stride, self.seed = trajectories, length, stride, seed
        self._starts: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return len(self.trajectories)

    def __getitem__(self, item: tuple[int, int]) -> Tensor:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: list[tuple[int, int]]) -> Tensor:
        """The clips named by (epoch, index): (B, length, 4 or 6)."""
        epoch = items[0][0]
        if self._starts[0] != epoch:
            last = self.trajectories.shape[1] - self.length
            generator = seeded_generator(self.seed, CLIP_STREAM, epoch)
            starts = torch.randint(0, last // self.stride + 1, (len(self),), generator=generator)
            self._starts = (epoch, starts * self.stride)
        index = torch.tensor([index for _, index in items])
        frames = self._starts[1][index][:, None] + torch.arange(self.length)
        return self.trajectories[index[:, None], frames]


class DoublePendulum(SingleLoaderDataModule):
    """Trajectories of a double pendulum, free or actuated by torques, observed as pixels or as coordinates of the two bobs.

    Training, validation and test trajectories come from seeds of their own. Initial angles of a free pendulum are uniform
    in [-pi, pi] and angular velocities in [-2 pi, 2 pi]; `datamodules.torques` says where an actuated one starts.

    Actions and frames: window t of a batch ends at its newest frame, and action t begins to act there and lasts until the
    newest frame of window t + 1. So no action has moved anything that its window, or an earlier one, shows.

    >>> data = DoublePendulum(size=8, sequence_length=10, val_size=2, test_size=2, image_size=32)
    >>> data.observe(data.trajectories("val")).observations.shape  # trajectories, windows, frames of a window, pixels
    torch.Size([2, 9, 2, 32, 32])

    Args:
        size: Number of training trajectories.
        sequence_length: Frames of a training or validation trajectory, 0.05 s apart.
        clip_length: Frames of a trajectory that one training sample shows, from a random start in each epoch; at most
            `sequence_length`, and by default all of it.
        val_size: Number of validation trajectories.
        test_size: Number of test trajectories.
        test_sequence_length: Frames of a test trajectory.
        observation: What a frame is: "pixels" draws the pendulum, "coordinates" gives x1, y1, x2, y2 of the bobs in meters.
        history: Consecutive frames per observation. Two are the fewest that contain a velocity.
        image_size: Height and width of an image in pixels.
        channels: Number of channels of an image, 1 for gray or 3 for RGB.
        masses: Masses of the two bobs in kilograms.
        lengths: Lengths of the two rods in meters.
        gravity: Gravitational acceleration in meters per second squared.
        torque_limits: Maximum torques of the shoulder and the elbow in newton meters; the pendulum swings freely if left
            out. Each torque is drawn uniformly between its limits.
        action_repeat: Number of frames for which a torque is held.
        stride: Frames from one window to the next, which is the time step of a model. Divides `action_repeat` if the
            pendulum is actuated, so that one action lies between two windows.
        batch_size: Trajectories per batch and process.
        num_workers: Number of processes that cut clips; 0 cuts them in the training process, which costs less than
            sending them.
        seed: Seed of all trajectories, clips and sample orders.

    Raises:
        ValueError: A number out of its range, named together with what is allowed.
    """

    batch_type = ClipBatch

    def __init__(
        self,
        size: int = 10_000,
        sequence_length: int = 30,
        clip_length: int | None = None,
        val_size: int = 256,
        test_size: int = 1_000,
        test_sequence_length: int = 120,
        observation: Literal["pixels", "coordinates"] = "pixels",
        history: int = 2,
        image_size: int = 64,
        channels: int = 1,
        masses: tuple[float, float] = (1.0, 1.0),
        lengths: tuple[float, float] = (1.0, 1.0),
        gravity: float = 9.81,
        torque_limits: tuple[float, float] | None = None,
        action_repeat: int = 5,
        stride: int = 1,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        counts = {
            "size": size,
            "val_size": val_size,
            "test_size": test_size,
            "history": history,
            "action_repeat": action_repeat,
            "stride": stride,
            "batch_size": batch_size,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"data.{name}={value}: give an integer of at least 1.")
        if seed < 0 or num_workers < 0:
            raise ValueError(f"data.seed={seed}, data.num_workers={num_workers}: neither may be negative.")
        for name, frames in (("sequence_length", sequence_length), ("test_sequence_length", test_sequence_length)):
            if frames < history + stride:
                raise ValueError(
                    f"data.{name}={frames}: must be at least history={history} plus stride={stride}, or there is no later "
                    "window to predict."
                )
        clip_length = sequence_length if clip_length is None else clip_length
        if not history + stride <= clip_length <= sequence_length:
            raise ValueError(
                f"data.clip_length={clip_length}: choose at least history={history} plus stride={stride} and at most "
                f"sequence_length={sequence_length} frames."
            )
        if torque_limits is not None:
            if len(torque_limits) != 2 or not all(math.isfinite(limit) and limit > 0 for limit in torque_limits):
                raise ValueError(
                    f"data.torque_limits={torque_limits}: give two positive numbers in newton meters, of shoulder and elbow."
                )
            if action_repeat % stride:
                raise ValueError(
                    f"data.stride={stride} does not divide action_repeat={action_repeat}: several actions would lie between "
                    "two windows. Change one of them."
                )
        if observation not in ("pixels", "coordinates"):
            raise ValueError(f"data.observation={observation!r}: choose 'pixels' or 'coordinates'.")
        check_image(image_size, channels)
        self.pendulum = Pendulum(masses, lengths, gravity)
        self.sizes = {"train": size, "val": val_size, "test": test_size}
        self.num_frames = {"train": sequence_length, "val": sequence_length, "test": test_sequence_length}
        self.clip_length, self.history, self.observation = clip_length, history, observation
        self.image_size, self.channels = image_size, channels
        self.torque_limits = None if torque_limits is None else (float(torque_limits[0]), float(torque_limits[1]))
        self.action_repeat, self.stride = action_repeat, stride
        self.action_dim = 0 if torque_limits is None else 2
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self._trajectories: dict[str, Tensor] = {}

    @property
    def dynamics(self) -> dict[str, Any]:
        """What a world model of this data learns the laws of: physics, torques and the time step."""
        return {
            "masses": tuple(self.pendulum.masses),
            "lengths": tuple(self.pendulum.lengths),
            "gravity": self.pendulum.gravity,
            "torque_limits": self.torque_limits,
            "action_repeat": self.action_repeat if self.torque_limits else None,
            "stride": self.stride,
        }

    def trajectories(self, split: str) -> Tensor:
        """All trajectories of "train", "val" or "test", generated at the first call, float32.

        They are integrated in float64, in which the 120 frames of a test trajectory are exact to the eye.

        Returns:
            (N, T, 4) states, or (N, T, 6) of an actuated pendulum: the state, and the action from it to the next frame.
        """
        if split not in self._trajectories:
            generator = seeded_generator(self.seed, SPLITS.index(split))
            count, frames = self.sizes[split], self.num_frames[split]
            if self.torque_limits is None:
                initial = sample_initial_states(count, generator)
                self._trajectories[split] = self.pendulum.simulate(initial, frames, dtype=torch.float32)
            else:
                self._trajectories[split] = actuated_trajectories(
                    self.pendulum, self.torque_limits, count, frames, self.action_repeat, self.history - 1, generator
                )
        return self._trajectories[split]

    def first_clips(self, count: int, device: torch.device) -> ClipBatch:
        """The beginning of each of the first training trajectories, for a device."""
        return self.observe(self.trajectories("train")[:count, : self.clip_length].to(device))

    def observe(self, frames: Tensor) -> ClipBatch:
        """Turn frames into observations, on the device where they are.

        Args:
            frames: Consecutive frames (B, F, 4 or 6) of `trajectories`, or their bits, as the loaders yield them. The first
                one starts a window; frames without actions make a batch without actions.

        Returns:
            A batch of T = (F - history) // stride + 1 windows.
        """
        frames = frames.view(torch.float32) if frames.dtype == torch.int32 else frames
        states = frames[..., :4]
        newest = slice(self.history - 1, None, self.stride)
        if self.stride < self.history:  # windows overlap: draw each frame once; what is unfolded is a view
            windows = self._draw(states).unfold(1, self.history, self.stride).movedim(-1, 2)
        else:
            windows = self._draw(states.unfold(1, self.history, self.stride).movedim(-1, 2))
        actions = frames[:, newest, 4:][:, :-1] if frames.shape[-1] > 4 else None
        return ClipBatch(windows.flatten(2, 3), states[:, newest], actions)

    def _draw(self, states: Tensor) -> Tensor:
        """(..., 4) -> (..., C, S, S) pixels or (..., 4) coordinates."""
        if self.observation == "pixels":
            return render(states, self.image_size, self.pendulum.lengths, self.channels)
        return self.pendulum.positions(states)

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> ClipBatch:
        drawn = self.observe(batch)
        if self.trainer is None:
            return drawn
        # What the networks see is rounded to their precision after it is drawn; the states that evaluate them are not.
        return self.trainer.precision_plugin.convert_input(drawn)._replace(states=drawn.states)

    def make_train_loader(self) -> ResumableLoader:
        clips = Clips(as_bits(self.trajectories("train")), self.clip_length, self.stride, self.seed)
        return ResumableLoader(clips, self.train_sampler(len(clips)), **self.loader_settings())

    def order(self) -> dict[str, Any]:
        return {
            "size": self.sizes["train"],
            "sequence_length": self.num_frames["train"],
            "clip_length": self.clip_length,
            "seed": self.seed,
        }

    def val_dataloader(self) -> DataLoader[Any]:
        return self._held_out_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._held_out_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._held_out_loader("test")

    def _held_out_loader(self, split: str) -> DataLoader[Any]:
        rows = _Rows(as_bits(self.trajectories(split)))
        sampler = self.held_out_sampler(split, rows)
        return DataLoader(rows, batch_size=self.batch_size, sampler=sampler, pin_memory=self.on_gpu)


class _Rows(Dataset[Tensor]):
    """The rows of a tensor as a data set."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]
