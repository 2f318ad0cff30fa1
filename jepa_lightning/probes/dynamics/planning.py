"""Evaluation of an actuated pendulum's world model: planning, and whether it listens to its actions.

Shapes: E episodes, B batch, T windows, S starts, K steps ahead, D embedding dimension, A scalars of an action.
"""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from datamodules.batches import ClipBatch
from datamodules.physics import FRAME_SECONDS
from datamodules.rng import seeded_generator
from jepa_lightning.dynamics_checks import check_observations
from jepa_lightning.figures import rows_figure, show, steps_figure, write_video
from jepa_lightning.planner import Planner
from jepa_lightning.probes.dynamics.episodes import Controller, Imagination, Planning, Random, Zero, run
from jepa_lightning.probes.dynamics.image_decoder import actuated_jepa, load_state_decoder, true_images
from jepa_lightning.probes.dynamics.pendulum_episodes import (
    Oracle,
    PendulumWorld,
    Task,
    distances,
    reaching_task,
    standing_task,
    windows_of,
)
from jepa_lightning.probes.dynamics.planning_film import episode_film, episode_images
from jepa_lightning.probes.dynamics.planning_report import (
    RADII,
    action_figures,
    planning_notes,
    planning_table,
    rollout_errors,
)
from jepa_lightning.probes.dynamics.world_model_probe import check_same
from jepa_lightning.probes.report import save_report

REACH_FRAMES = 25
"""How far ahead of the start a goal lies, as in DINO-WM (Zhou et al. 2024)."""


TIP_HEIGHT = 0.5
"""What the tip must pass in a swing-up: half of the pendulum's length above the pivot, 1 m with two rods of 1 m."""

SWING_SECONDS, SWING_HORIZON = 6.0, 8
ROLLOUT_STEPS = 10
ORACLE_NOISE = (0.05, 0.5)
"""In radians and radians per second."""

TASK_STREAM, CONTROL_STREAM = 2**30, 2**30 + 1
"""Uses of the data's seed that no split and no epoch has."""


class PlanningProbe(LightningModule):
    """Plan with a world model of the actuated pendulum: reach goal images, swing up; and compare actions.

    There is nothing to fit: `test` alone writes report.json, report.md, rollouts.png and, with a decoder, plan.mp4,
    plan.png and rollouts_decoded.png.

    * Reaching: from the motion after three seconds of random torques to an image of where other torques led 25 frames
      later, in embedding space, with a receding horizon: a new plan at each window, of what pixels then show. An episode
      succeeds if both bobs are within 0.25 m of the goal in its last frame. Baselines: the first plan carried out to the
      end, zero and random torques, and the same search by an oracle, from the true state and from a noisy one.
    * Swing-up: from hanging to a still image of the pendulum upright, for 6 seconds, with plans 8 steps ahead. It
      succeeds if the tip gets half of the pendulum's length above the pivot. (Holding it there is not asked: even the
      oracle seldom does.)
    * Actions: the error of embeddings 10 steps ahead on test trajectories under the true actions, under those of another
      trajectory and under none.

    Args:
        checkpoint: Path of the checkpoint of a pendulum JEPA with actions, written by `fit`.
        decoder: Path of the checkpoint of an `ImageDecoder` on the same JEPA, for the video and the images; none by default.
        planner: Planner that searches for action sequences; one with its defaults if None.
        num_episodes: Number of episodes of reaching.
        num_swing_ups: Number of episodes of swinging up.
        goal: Another place for the tip than straight up, x and y in meters from the pivot, y pointing up; the episode then
            succeeds if the tip comes within 0.25 m of it.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, holds no pendulum JEPA with actions, or an argument is out of its range.
    """

    def __init__(
        self,
        checkpoint: str,
        decoder: str | None = None,
        planner: Planner | None = None,
        num_episodes: int = 100,
        num_swing_ups: int = 20,
        goal: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["planner"])
        for name, value in (("num_episodes", num_episodes), ("num_swing_ups", num_swing_ups)):
            if value < 1:
                raise ValueError(f"model.{name}={value}: give an integer of at least 1.")
        self.checkpoint, self.planner, self.goal = checkpoint, planner or Planner(), goal
        self.num_episodes, self.num_swing_ups = num_episodes, num_swing_ups
        self.jepa = actuated_jepa(checkpoint, "PlanningProbe")
        self.decoder = None if decoder is None else load_state_decoder(decoder).requires_grad_(False)
        if self.decoder is not None:
            check_same(
                self.jepa,
                self.decoder.jepa,
                f"model.decoder={decoder} decodes another JEPA than {checkpoint}: fit the decoder anew.",
            )
        self._collected: list[tuple[Tensor, Tensor]] = []

    def setup(self, stage: str) -> None:
        """Compare with the data module.

        Raises:
            ValueError: Data that the JEPA was not trained on, a goal out of reach, windows that do not divide the way to a
                goal, test trajectories too short to forecast, or several processes.
        """
        if self.trainer.world_size > 1:
            raise ValueError("The report is made in one process: set --trainer.devices 1.")
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is None:
            raise ValueError("PlanningProbe needs the physics of a DoublePendulum: pass it as datamodule.")
        check_observations(self.jepa, data)
        data.pendulum.reach(self.tip)
        if math.dist(self.tip, (0.0, -sum(data.pendulum.lengths))) < RADII[1]:
            raise ValueError(f"model.goal={self.goal}: the tip hangs within {RADII[1]} m of it. Choose another place.")
        if REACH_FRAMES % data.stride:
            raise ValueError(f"data.stride={data.stride} does not divide the {REACH_FRAMES} frames to a goal.")
        if data.history + ROLLOUT_STEPS * data.stride > data.num_frames["test"]:
            raise ValueError(
                f"data.test_sequence_length={data.num_frames['test']}: forecasts {ROLLOUT_STEPS} steps ahead need at least "
                f"{data.history + ROLLOUT_STEPS * data.stride} frames."
            )

    @property
    def tip(self) -> tuple[float, float]:
        """The place of the tip in the second task, in meters."""
        data: Any = self.trainer.datamodule
        return (0.0, sum(data.pendulum.lengths)) if self.goal is None else self.goal

    def test_step(self, batch: ClipBatch, batch_idx: int) -> None:
        assert batch.actions is not None
        self._collected.append((self.jepa.encode(batch.observations).float(), batch.actions))
        if batch_idx == 0:
            assert batch.states is not None
            self._first_states = batch.states[0]

    @torch.no_grad()
    def rollout_errors(self, features: Tensor, actions: Tensor) -> dict[str, Tensor]:
        """Mean squared errors 1 ... K steps ahead: kind of actions, or "still" for persistence -> (K,).

        Args:
            features: Embeddings of all test trajectories, (N, T, D).
            actions: Actions of all test trajectories, (N, T - 1, A).
        """
        errors, kinds, starts = rollout_errors(self.jepa, features, actions, ROLLOUT_STEPS)
        if self.decoder is not None:
            strip = {"true frames": self.draw(self._first_states[1 : 1 + ROLLOUT_STEPS])}
            for name, given in kinds.items():
                forecast = self.jepa.forecast(starts[0, 0], ROLLOUT_STEPS, given[0, 0])
                strip[f"{name} actions"] = self.decoder.decode(forecast)
            figure = rows_figure(strip)
            figure.savefig(self._directory / "rollouts_decoded.png")
            show(self.trainer, "roll-outs/decoded", figure)
        return errors

    @property
    def _directory(self) -> Path:
        directory = Path(self.trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def draw(self, states: Tensor) -> Tensor:
        data: Any = self.trainer.datamodule
        return true_images(self.jepa, data, states.float().to(self.device))

    def on_test_epoch_end(self) -> None:
        began = time.monotonic()
        data: Any = self.trainer.datamodule
        features, actions = (torch.cat(parts) for parts in zip(*self._collected, strict=True))
        self._collected = []
        errors = self.rollout_errors(features, actions)
        figure = steps_figure(errors, f"steps ahead ({data.stride * FRAME_SECONDS:g} s each)", "squared error of embeddings")
        figure.savefig(self._directory / "rollouts.png")
        show(self.trainer, "roll-outs/error", figure)
        reached, films = self.reaching(data)
        swung, swing_film = self.standing(data)
        if self.decoder is not None:
            film = np.concatenate([*films, swing_film])
            write_video(self._directory / "plan.mp4", film, frames_per_second=round(1 / FRAME_SECONDS / 2))
            show(self.trainer, "plan/video", np.concatenate(films))
        seconds = {"plan_of_an_episode": reached.pop("seconds_per_plan"), "all": time.monotonic() - began}
        report = {
            "planning": reached | {"swing_up": swung.pop("success"), "swing_up_details": swung},
            "actions": action_figures(errors),
            "planner": vars(self.planner),
            "data": self.trainer.datamodule.dynamics,
            "checkpoint": self.checkpoint,
            "target_mode": self.jepa.target_mode,
            "seconds": seconds,
        }
        save_report(
            self._directory, report, "Planning", planning_notes(self, REACH_FRAMES, SWING_SECONDS), planning_table(report)
        )

    def _generator(self, *key: int) -> torch.Generator:
        data: Any = self.trainer.datamodule
        return seeded_generator(data.seed, *key)

    def _imagination(self, data: Any, task: Task) -> Imagination:
        return Imagination(self.jepa, windows_of(data, task.goals).to(self.device), self.planner)

    def reaching(self, data: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Figures of the first task, and films of its first episodes."""
        steps = REACH_FRAMES // data.stride
        task = reaching_task(data, self.num_episodes, steps, RADII[1], self._generator(TASK_STREAM, 0))
        goals = task.goals[:, -1]

        def planning(look: Any, every: int, device: Any = "cpu") -> Planning:
            generator = torch.Generator(device).manual_seed(data.seed)
            return Planning(self.planner, look, steps, generator, deadline=steps, every=every)

        def knowing(noise: tuple[float, float], every: int) -> Planning:
            return planning(Oracle(goals, noise, self._generator(CONTROL_STREAM, 1)), every)

        replanning = planning(self._imagination(data, task), 1, self.device)
        once = planning(self._imagination(data, task), steps, self.device)
        controllers: dict[str, Controller] = {
            "success": replanning,
            "one_plan": once,
            "zero_torque": Zero(),
            "random_torque": Random(self._generator(CONTROL_STREAM, 0)),
            "oracle": knowing((0.0, 0.0), steps),
            "noisy_oracle": knowing(ORACLE_NOISE, steps),
            "noisy_oracle_replanning": knowing(ORACLE_NOISE, 1),
        }
        figures: dict[str, Any] = {"episodes": self.num_episodes}
        standard_errors, at_radius, seconds = {}, {}, {}
        films: list[np.ndarray] = []
        for name, controller in controllers.items():
            began = time.monotonic()
            world = run(PendulumWorld(data, task.starts), controller, steps)
            seconds[name] = time.monotonic() - began
            farther = distances(data, world.states, goals).amax(dim=-1)  # (E,)
            rates = {str(radius): (farther < radius).double().mean().item() for radius in RADII}
            figures[name], at_radius[name] = rates[str(RADII[1])], rates
            standard_errors[name] = math.sqrt(figures[name] * (1 - figures[name]) / self.num_episodes)
            rank_zero_info(f"reaching, {name}: {figures[name]:.2f} of {self.num_episodes} ({seconds[name]:.0f} s)")
            if name == "one_plan" and self.decoder is not None:
                self._show_plan(data, world, task, once)
                chosen = range(min(4, len(goals)))
                films = [episode_film(self, data, world, task, once, row, "predicted at frame 0") for row in chosen]
        figures["standard_error"] = standard_errors.pop("success")
        figures |= {"standard_errors": standard_errors, "at_radius": at_radius}
        figures["seconds_per_plan"] = seconds["one_plan"] / self.num_episodes
        return figures, films

    def standing(self, data: Any) -> tuple[dict[str, Any], np.ndarray | None]:
        """Figures of the second task, and a film of its first episode."""
        steps = round(SWING_SECONDS / FRAME_SECONDS / data.stride)
        task = standing_task(data, self.num_swing_ups, self.tip, self._generator(TASK_STREAM, 1))
        generator = torch.Generator(self.device).manual_seed(data.seed)
        planning = Planning(self.planner, self._imagination(data, task), SWING_HORIZON, generator)
        figures: dict[str, Any] = {"episodes": self.num_swing_ups, "goal": list(self.tip)}
        film = None
        controllers: dict[str, Controller] = {
            "success": planning,
            "zero_torque": Zero(),
            "random_torque": Random(self._generator(CONTROL_STREAM, 2)),
        }
        for name, controller in controllers.items():
            world = run(PendulumWorld(data, task.starts), controller, steps)
            tips = data.pendulum.positions(world.frames)[..., 2:]  # (E, F, 2)
            away = (tips - tips.new_tensor(self.tip)).norm(dim=-1).amin(dim=1)
            highest = tips[..., 1].amax(dim=1)
            succeeded = (highest > TIP_HEIGHT * sum(data.pendulum.lengths)) if self.goal is None else (away < RADII[1])
            figures[name] = succeeded.double().mean().item()
            rank_zero_info(f"swing-up, {name}: {figures[name]:.2f} of {self.num_swing_ups}")
            if name == "success":
                figures["standard_error"] = math.sqrt(figures[name] * (1 - figures[name]) / self.num_swing_ups)
                figures |= {"median_highest": highest.median().item(), "median_nearest": away.median().item()}
                if self.decoder is not None:
                    film = episode_film(self, data, world, task, planning, 0, "predicted a step before")
        return figures, film

    def _show_plan(self, data: Any, world: PendulumWorld, task: Task, planning: Planning) -> None:
        """Write plan.png, the first episode at each window, and show the same figure."""
        happened, predicted, goal = episode_images(self, data, world, task, planning, 0)
        rows = {"what happened": happened[:: data.stride], "predicted": predicted, "goal": goal.expand_as(predicted)}
        figure = rows_figure(rows)
        figure.savefig(self._directory / "plan.png")
        show(self.trainer, "plan/first episode", figure)
