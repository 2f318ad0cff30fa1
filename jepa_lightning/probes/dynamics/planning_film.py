"""What happened in an episode, what the world model predicted of it, and the goal, as images.

Shapes: F frames, T windows, C channels, S image size.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa_lightning.figures import side_by_side
from jepa_lightning.probes.dynamics.episodes import Planning
from jepa_lightning.probes.dynamics.pendulum_episodes import PendulumWorld, Task, windows_of


def episode_images(
    probe: Any, data: Any, world: PendulumWorld, task: Task, planning: Planning, episode: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Frames of an episode (F, C, S, S), decoded predictions of each window (T, C, S, S), the goal (C, S, S).

    Args:
        probe: A `PlanningProbe` with a decoder.
        data: Its data module.
        world: What the plans led to.
        task: Where the episodes start, and their goals.
        planning: Who has acted, with what was predicted.
        episode: Its number.
    """
    happened = probe.draw(world.frames[episode, data.history - 1 :])
    begin = probe.jepa.encode(windows_of(data, task.starts[episode : episode + 1]).to(probe.device))[0]  # (1, D)
    predicted = probe.decoder.decode(torch.cat([begin, *(part[episode] for part in planning.predicted)]))
    return happened, predicted, probe.draw(task.goals[episode, -1])


def episode_film(
    probe: Any, data: Any, world: PendulumWorld, task: Task, planning: Planning, episode: int, title: str
) -> np.ndarray:
    """Three panels; the prediction stands still until the next window. See `episode_images`."""
    happened, predicted, goal = episode_images(probe, data, world, task, planning, episode)
    shown = torch.arange(len(happened)) // data.stride
    return side_by_side({"what happened": happened, title: predicted[shown], "goal": goal.expand_as(happened)})
