"""The pendulum obeys mechanics, derived here independently of the code."""

import math

import pytest
import torch

from datamodules.physics import FRAME_SECONDS, Pendulum, sample_initial_states
from datamodules.rng import seeded_generator

UNEQUAL = Pendulum(masses=(1.3, 0.7), lengths=(0.8, 1.1), gravity=9.0)


def states(count: int = 200, seed: int = 0) -> torch.Tensor:
    return sample_initial_states(count, seeded_generator(seed))


def lagrangian(pendulum: Pendulum, q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Kinetic minus potential energy from the Cartesian velocities, by automatic differentiation of the positions."""

    def xy(angles: torch.Tensor) -> torch.Tensor:
        (l1, l2), (t1, t2) = pendulum.lengths, angles
        first = torch.stack([l1 * t1.sin(), -l1 * t1.cos()])
        return torch.cat([first, first + torch.stack([l2 * t2.sin(), -l2 * t2.cos()])])

    position, velocity = torch.func.jvp(xy, (q,), (v,))
    m1, m2 = pendulum.masses
    kinetic = 0.5 * m1 * velocity[:2].square().sum() + 0.5 * m2 * velocity[2:].square().sum()
    return kinetic - pendulum.gravity * (m1 * position[1] + m2 * position[3])


@pytest.mark.parametrize("pendulum", [Pendulum(), UNEQUAL])
def test_accelerations_satisfy_the_euler_lagrange_equations(pendulum: Pendulum) -> None:
    torques = torch.randn(20, 2, dtype=torch.float64)
    for state, torque in zip(states(20), torques, strict=True):
        q, v = state[:2], state[2:]
        a = pendulum.accelerations(state, torque)

        def momentum(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.func.grad(lambda v: lagrangian(pendulum, q, v))(v)

        _, rate = torch.func.jvp(momentum, (q, v), (v, a))
        force = torch.func.grad(lambda q, v=v: lagrangian(pendulum, q, v))(q)
        generalized = torch.stack([torque[0] - torque[1], torque[1]])
        torch.testing.assert_close(rate, force + generalized, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pendulum", [Pendulum(), UNEQUAL])
def test_energy_drifts_at_most_3e_4_in_30_frames(pendulum: Pendulum) -> None:
    initial = states(5000)
    energy = pendulum.energy(pendulum.simulate(initial, 30))
    drift = (energy - energy[:, :1]).abs().amax(dim=1) / (energy[:, 0] - pendulum.lowest_energy)
    assert drift.max() <= 3e-4


def test_energy_is_kinetic_plus_potential() -> None:
    state = states(1)[0]
    q, v = state[:2], state[2:]
    rest = lagrangian(UNEQUAL, q, torch.zeros(2, dtype=torch.float64))  # minus the potential energy
    kinetic = lagrangian(UNEQUAL, q, v) - rest
    torch.testing.assert_close(UNEQUAL.energy(state), kinetic - rest)
    assert UNEQUAL.energy(torch.zeros(4)).item() == pytest.approx(UNEQUAL.lowest_energy)


def test_work_of_the_torques_equals_the_change_of_energy() -> None:
    torques = torch.randn(50, 1, 2, dtype=torch.float64).expand(-1, 40, -1) * torch.tensor([10.0, 5.0])
    substeps = 40
    fine = UNEQUAL.simulate(states(50), 41, torques, substeps=substeps)
    shoulder, elbow = torques[:, 0, :1], torques[:, 0, 1:]
    # Constant joint torques do work shoulder * theta1 + elbow * (theta2 - theta1).
    theta1, theta2 = fine[..., 0] - fine[:, :1, 0], fine[..., 1] - fine[:, :1, 1]
    work = shoulder * theta1 + elbow * (theta2 - theta1)
    energy = UNEQUAL.energy(fine)
    torch.testing.assert_close(energy - energy[:, :1], work, rtol=1e-5, atol=1e-4)


def test_torque_of_a_frame_moves_later_frames_only() -> None:
    initial, torques = states(5), torch.zeros(5, 9, 2, dtype=torch.float64)
    pushed = torques.clone()
    pushed[:, 4] = 3.0
    still, moved = (Pendulum().simulate(initial, 10, t) for t in (torques, pushed))
    assert torch.equal(still[:, :5], moved[:, :5])
    assert not torch.equal(still[:, 5], moved[:, 5])
    torch.testing.assert_close(still, Pendulum().simulate(initial, 10))


def test_mirrored_start_gives_the_mirrored_motion() -> None:
    initial = states(100)
    torch.testing.assert_close(UNEQUAL.simulate(-initial, 30), -UNEQUAL.simulate(initial, 30), rtol=0, atol=1e-9)


def test_small_swing_has_the_period_of_the_normal_mode() -> None:
    pendulum = Pendulum()
    # Slow mode of two equal arms: omega^2 = (2 - sqrt 2) g / l, with theta2 = sqrt(2) theta1.
    initial = torch.tensor([[1e-4, math.sqrt(2) * 1e-4, 0, 0]], dtype=torch.float64)
    omega = math.sqrt((2 - math.sqrt(2)) * 9.81)
    times = FRAME_SECONDS * torch.arange(60, dtype=torch.float64)
    torch.testing.assert_close(pendulum.simulate(initial, 60)[0, :, 0], 1e-4 * torch.cos(omega * times), rtol=0, atol=1e-9)


def test_float32_follows_float64_for_30_frames() -> None:
    initial = states(500)
    error = (Pendulum().simulate(initial.float(), 30) - Pendulum().simulate(initial, 30)).abs()[:, -1, :2].amax(dim=1)
    assert error.median() < 1e-5


def test_initial_states_favor_no_direction() -> None:
    drawn = states(20_000)
    bounds = torch.tensor([math.pi, math.pi, 2 * math.pi, 2 * math.pi])
    assert (drawn.abs() <= bounds).all()
    standard_error = bounds / math.sqrt(3 * len(drawn))
    assert (drawn.mean(dim=0).abs() < 4 * standard_error).all()
    assert torch.equal(drawn, states(20_000))


@pytest.mark.parametrize("change", [{"masses": (0.0, 1.0)}, {"lengths": (1.0, -1.0)}, {"gravity": -1.0}, {"masses": (1.0,)}])
def test_impossible_pendulums_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Pendulum(**change)
