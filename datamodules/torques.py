"""Actuation of a pendulum: joint torques held for several frames, and the motions that they make.

An action is a pair of torques (shoulder, elbow) over their limits, each in [-1, 1]. Shapes: N trajectories, T frames.
"""

import torch
from torch import Tensor

from datamodules.physics import FRAME_SECONDS, Pendulum, sample_initial_states

WARM_UP_FRAMES = round(3 / FRAME_SECONDS)
"""Three seconds of random torques bring a hanging pendulum to the motions that it has in the long run."""

ANYWHERE = 1 / 3
"""Fraction of the trajectories that start in any state, upright ones included: from hanging, torques seldom lead there."""


def random_actions(count: int, num_frames: int, held: int, generator: torch.Generator, first: int = 0) -> Tensor:
    """Actions drawn uniformly and independently, and held: (count, num_frames, 2) in float64.

    Args:
        count: Number of trajectories N.
        num_frames: Number of frames in which actions are applied.
        held: Number of frames for which an action is held.
        generator: CPU generator from which all randomness comes.
        first: Frame at which an action is drawn anew, hence also `held` frames later and so on.
    """
    cut = -first % held  # frames of the first action that lie before the trajectory
    draws = -(-(num_frames + cut) // held)
    drawn = torch.rand(count, draws, 2, generator=generator, dtype=torch.float64) * 2 - 1
    return drawn.repeat_interleave(held, dim=1)[:, cut : cut + num_frames]


def after_warm_up(
    pendulum: Pendulum, limits: tuple[float, float], frames: Tensor, held: int, generator: torch.Generator
) -> Tensor:
    """States of pendulums that hung at rest and were then actuated at random.

    Args:
        pendulum: Constants of the pendulum.
        limits: Maximum torques of the shoulder and the elbow, in newton meters.
        frames: Number of frames (N,) for which each was actuated, 0 to `WARM_UP_FRAMES`.
        held: Number of frames for which an action is held.
        generator: CPU generator from which all randomness comes.

    Returns:
        States (N, 4) in float64.
    """
    rest = torch.zeros(len(frames), 4, dtype=torch.float64)
    actions = random_actions(len(frames), WARM_UP_FRAMES, held, generator)
    motion = pendulum.simulate(rest, 1 + WARM_UP_FRAMES, actions * rest.new_tensor(limits))
    return motion[torch.arange(len(frames)), frames]


def actuated_trajectories(
    pendulum: Pendulum,
    limits: tuple[float, float],
    count: int,
    num_frames: int,
    held: int,
    first: int,
    generator: torch.Generator,
) -> Tensor:
    """Random motions under random torques.

    A third starts in any state, as a free pendulum does; the rest hung at rest and was actuated for up to three seconds.

    Args:
        pendulum: Constants of the pendulum.
        limits: Maximum torques of the shoulder and the elbow, in newton meters.
        count: Number of trajectories N.
        num_frames: Number of frames T.
        held: Number of frames for which an action is held.
        first: Frame at which an action is drawn anew, as in `random_actions`.
        generator: CPU generator from which all randomness comes.

    Returns:
        Trajectories (N, T, 6), float32: the state of each frame, and the action from it to the next; that of the last
        frame changes nothing that is seen.
    """
    anywhere = round(count * ANYWHERE)
    frames = torch.randint(WARM_UP_FRAMES + 1, (count - anywhere,), generator=generator)
    initial = torch.cat(
        [sample_initial_states(anywhere, generator), after_warm_up(pendulum, limits, frames, held, generator)]
    )[torch.randperm(count, generator=generator)]  # so that any subset of them is like the whole
    actions = random_actions(count, num_frames, held, generator, first)
    states = pendulum.simulate(initial, num_frames, actions[:, :-1] * initial.new_tensor(limits), dtype=torch.float32)
    return torch.cat([states, actions.float()], dim=-1)
