"""The actuated pendulum: torques, and which frame an action moves."""

import math

import pytest
import torch
from conftest import small_data, small_driven_data

from datamodules.physics import Pendulum
from datamodules.torques import after_warm_up, random_actions


@pytest.mark.parametrize("first", [0, 1, 2, 5, 7])
def test_an_action_is_held_and_drawn_anew_at_the_first_frame(first: int) -> None:
    actions = random_actions(50, 23, 5, torch.Generator().manual_seed(0), first)
    assert actions.shape == (50, 23, 2) and actions.abs().max() <= 1
    changes = (actions.diff(dim=1) != 0).any(dim=-1).any(dim=0).nonzero().flatten() + 1
    assert changes.tolist() == [frame for frame in range(1, 23) if (frame - first) % 5 == 0]
    torques = random_actions(4000, 5, 5, torch.Generator().manual_seed(0))[:, 0]
    assert torch.corrcoef(torques.T)[0, 1].abs() < 0.05, "the joints are actuated independently"
    assert torques.std() == pytest.approx(1 / math.sqrt(3), abs=0.01)


@pytest.mark.parametrize(("stride", "history"), [(5, 3), (5, 2), (1, 2), (5, 7)])
def test_actions_lead_from_each_window_to_the_next(stride: int, history: int) -> None:
    """The physics between two windows is that of the batch's action, so no action is shifted by a window."""
    data = small_driven_data(stride=stride, history=history)
    (clip,) = [batch for batch, _ in zip(data.train_dataloader(), range(1), strict=False)]
    batch = data.observe(clip)
    windows = batch.states.shape[1]
    assert windows == (23 - history) // stride + 1 == batch.observations.shape[1]
    assert batch.actions.shape == (4, windows - 1, 2)
    for t in range(windows - 1):
        torques = batch.actions[:, t].double() * torch.tensor([10.0, 5.0])
        path = data.pendulum.simulate(batch.states[:, t].double(), 1 + stride, torques[:, None].expand(-1, stride, -1))
        torch.testing.assert_close(path[:, -1].float(), batch.states[:, t + 1], rtol=1e-4, atol=1e-4)
    other = data.pendulum.simulate(batch.states[:, 0].double(), 1 + stride, None)[:, -1].float()
    assert (other - batch.states[:, 1]).abs().max() > 1e-3, "torques move the pendulum"


def test_no_window_shows_what_its_action_moves() -> None:
    """Frames up to window t are the same whatever action t and later ones are."""
    data = small_driven_data()
    frames = data.trajectories("train")[:3, :23].double()
    torques = frames[:, :-1, 4:] * torch.tensor([10.0, 5.0])
    for t in range(3):
        newest = data.history - 1 + t * data.stride
        changed = torques.clone()
        changed[:, newest:] = 7.0
        path = data.pendulum.simulate(frames[:, 0, :4], 23, changed)
        torch.testing.assert_close(path[:, : newest + 1], frames[..., : newest + 1, :4], rtol=1e-3, atol=1e-3)
        seen = data.observe(torch.cat([path, frames[..., 4:]], dim=-1).float()).observations
        torch.testing.assert_close(
            seen[:, : t + 1], data.observe(frames.float()).observations[:, : t + 1], atol=1e-3, rtol=0
        )
        assert (path[:, newest + 1] - frames[:, newest + 1, :4]).abs().max() > 1e-2


@pytest.mark.parametrize("stride", [1, 2, 5])
def test_strided_windows_are_those_of_all_frames(stride: int) -> None:
    """Whether or not windows overlap."""
    every = small_data(observation="pixels", image_size=16, history=3, sequence_length=20)
    some = small_data(observation="pixels", image_size=16, history=3, sequence_length=20, stride=stride)
    frames = every.trajectories("train")[:2]
    assert torch.equal(some.observe(frames).observations, every.observe(frames).observations[:, ::stride])
    assert torch.equal(some.observe(frames).states, every.observe(frames).states[:, ::stride])


def test_work_of_the_torques_is_the_energy_gained() -> None:
    pendulum = Pendulum()
    actions = random_actions(20, 30, 5, torch.Generator().manual_seed(1)) * torch.tensor([10.0, 5.0], dtype=torch.float64)
    path = pendulum.simulate(torch.zeros(20, 4, dtype=torch.float64), 31, actions)
    # Joint angles: the shoulder turns theta1, the elbow theta2 - theta1. Held over a frame, a torque does torque * turn.
    turned = path[:, 1:, :2] - path[:, :-1, :2]
    work = (actions[..., 0] * turned[..., 0] + actions[..., 1] * (turned[..., 1] - turned[..., 0])).sum(dim=1)
    gained = pendulum.energy(path[:, -1]) - pendulum.energy(path[:, 0])
    torch.testing.assert_close(work, gained, rtol=1e-4, atol=1e-3)


def test_a_third_starts_anywhere_and_upright_states_occur() -> None:
    data = small_driven_data(size=1000)
    states = data.trajectories("train")[..., :4]
    fast = (states[:, 0, 2:].abs() > math.pi).any(dim=-1)
    assert 0.2 < fast.float().mean() < 0.8
    tips = data.pendulum.positions(states)[..., 3]
    assert (tips > 1.8).float().mean() > 0.005 and (tips < -1.8).float().mean() > 0.05
    rest = after_warm_up(data.pendulum, (10.0, 5.0), torch.zeros(3, dtype=torch.int64), 5, torch.Generator())
    assert torch.equal(rest, torch.zeros(3, 4, dtype=torch.float64))


def test_splits_share_no_torques_and_a_seed_repeats_them() -> None:
    data = small_driven_data()
    assert torch.equal(data.trajectories("val"), small_driven_data().trajectories("val"))
    assert not torch.isin(data.trajectories("val")[..., 4:], data.trajectories("train")[..., 4:]).any()
    assert not torch.equal(small_driven_data(seed=1).trajectories("val"), data.trajectories("val"))


def test_clips_start_where_an_action_begins() -> None:
    data = small_driven_data(size=64, batch_size=64, sequence_length=60)
    (clips,) = data.train_dataloader()
    newest = data.history - 1
    held = clips[:, newest:, 4:].unfold(1, 5, 5)  # (B, blocks, 2, 5)
    assert (held == held[..., :1]).all()
    starts = {tuple(clip[0].tolist()) for clip in clips}
    assert len(starts) == 64


@pytest.mark.parametrize("tip", [(0.0, 2.0), (1.2, 0.3), (-0.5, -1.0), (0.0, 0.0)])
def test_reach_puts_the_tip_there(tip: tuple[float, float]) -> None:
    assert Pendulum().positions(Pendulum().reach(tip))[2:].tolist() == pytest.approx(tip, abs=1e-9)
    long = Pendulum(lengths=(1.5, 0.8))
    if math.hypot(*tip) >= 0.7:
        assert long.positions(long.reach(tip))[2:].tolist() == pytest.approx(tip, abs=1e-9)


def test_a_place_out_of_reach_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot be at \(2.0, 1.0\): it reaches distances from 0 to 2 m"):
        Pendulum().reach((2.0, 1.0))
    with pytest.raises(ValueError, match="from 0.7 to 2.3 m"):
        Pendulum(lengths=(1.5, 0.8)).reach((0.1, 0.1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 2}, "stride=2 does not divide action_repeat=5"),
        ({"stride": 0}, "data.stride=0"),
        ({"torque_limits": (10.0, -1.0)}, "data.torque_limits="),
        ({"clip_length": 7}, "data.clip_length=7: choose at least history=3 plus stride=5"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_driven_data(**change)
