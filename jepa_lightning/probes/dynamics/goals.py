"""Evaluation of a world model of any environment: does it lead to goals, given as images?

Shapes: E episodes, A scalars of an action, D embedding dimension, L scalars of a state.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from torch import Tensor

from datamodules.batches import ClipBatch
from datamodules.environments import Environment, settings_of
from datamodules.trajectories import Trajectories
from jepa_lightning.dynamics_checks import check_observations
from jepa_lightning.figures import show, side_by_side, write_video
from jepa_lightning.planner import Planner
from jepa_lightning.probes.baselines import BASELINE_SEED
from jepa_lightning.probes.dynamics.environment_world import (
    EnvironmentWorld,
    SimulatorOracle,
    actions_of,
    check_replay,
)
from jepa_lightning.probes.dynamics.episodes import Controller, Imagination, Planning, Random, Zero, run
from jepa_lightning.probes.dynamics.goal_report import TITLES, goal_figures, goal_notes, goal_table
from jepa_lightning.probes.dynamics.goal_tasks import Goal, Once, Replay, Timed, draw_goals, goal_windows, image_window
from jepa_lightning.probes.dynamics.inverse import InverseController, load_inverse
from jepa_lightning.probes.dynamics.world_model_probe import world_model
from jepa_lightning.probes.report import save_report

ORACLE = Planner(num_samples=32, num_iterations=5, num_further_iterations=2, num_elites=6)
"""The oracle's search: a simulator in Python is slower than a network by far."""


class GoalProbe(LightningModule):
    """Plan with a world model to goal images, in the environment that its data was recorded in.

    There is nothing to fit: `test` alone writes report.json, report.md and goals.mp4. Starts are reached by the seed and the
    first actions of held-out episodes, so that any environment will do that is a function of its seed; the goal is what the
    same episode showed `offset` frames later. Planning has a receding horizon: a new plan at each step of the model, of what
    is then seen, for arrival at the same time as the first plan's; if that has passed, for another as far ahead.
    Baselines: the first plan carried out to its end, the recorded actions themselves, zero and random actions, the same
    model at random initialization and, where the simulator can be set, a search by trying out (the oracle).

    Args:
        checkpoint: Path of the checkpoint of a dynamics JEPA with actions, written by `fit`.
        offset: Frames from the start to the goal in the recording.
        budget: Frames that an episode may take; `offset` by default.
        horizon: Steps of a plan; by default those to the goal.
        radius: Distance of named states within which the goal is reached. With None, the goal is reached where the
            environment ends the episode (`terminated`), whatever the goal image shows: for environments that end at a goal
            of their own, which the image has in it.
        at_end: Whether it counts where the episode is at its last frame, not whether it has passed the goal: what swings or
            spins passes most goals.
        state: Names of the scalars of the state whose Euclidean distance counts; all by default.
        planner: Planner that searches for action sequences; one with its defaults if None.
        goal_image: Path of an image that is the goal of all episodes, in place of those from the recording. Nothing is known
            of its state, so the figures are where the environment ends the episode, and the distance from the image in
            embedding space, at the end over that at the start. Without `radius`; `offset` and `budget` are still the steps
            of a plan and of an episode.
        inverse: Path of the checkpoint of an `InverseModel` on the same JEPA, which chooses actions without a search.
        num_episodes: Number of episodes E.
        parallel: Episodes that are planned for at once.
        baselines: Which baselines are run, of "one_plan", "replay", "zero", "random", "untrained" and "oracle".

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, holds no world model with actions, or an argument is out of its range.
    """

    def __init__(
        self,
        checkpoint: str,
        offset: int = 25,
        budget: int | None = None,
        horizon: int | None = None,
        radius: float | None = None,
        at_end: bool = False,
        state: list[str] | None = None,
        planner: Planner | None = None,
        goal_image: str | None = None,
        inverse: str | None = None,
        num_episodes: int = 50,
        parallel: int = 25,
        baselines: list[Literal["one_plan", "replay", "zero", "random", "untrained", "oracle"]] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["planner"])
        for name, value in {"offset": offset, "num_episodes": num_episodes, "parallel": parallel}.items():
            if value < 1:
                raise ValueError(f"model.{name}={value}: give an integer of at least 1.")
        if radius is not None and not radius > 0:
            raise ValueError(f"model.radius={radius}: must be positive, or null for the environment's own criterion.")
        if radius is None and at_end:
            raise ValueError("model.at_end=true needs a model.radius: without one, the end of the episode is what counts.")
        if goal_image is not None and radius is not None:
            raise ValueError(f"model.goal_image={goal_image}: no state is known of it, so leave out model.radius.")
        self.goal_image = goal_image
        self.checkpoint, self.offset, self.budget, self.horizon = checkpoint, offset, budget or offset, horizon
        self.radius, self.at_end, self.state_names, self.planner = radius, at_end, state, planner or Planner()
        self.num_episodes, self.parallel = num_episodes, parallel
        self.jepa = world_model(checkpoint, "GoalProbe")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(BASELINE_SEED)
            self.untrained = type(self.jepa)(**self.jepa.built_with).requires_grad_(False).eval()
        self.inverse = None if inverse is None else load_inverse(inverse, self.jepa)
        self.baselines = list(TITLES)[2:] if baselines is None else baselines

    def setup(self, stage: str) -> None:
        """Compare with the data module.

        Raises:
            ValueError: It is none of recorded episodes, or not that of the model, or several processes.
        """
        if self.trainer.world_size > 1:
            raise ValueError("The report is made in one process: set --trainer.devices 1.")
        data = self.data
        if not isinstance(data, Trajectories):
            raise ValueError(f"GoalProbe needs recorded episodes: set data to Trajectories, not {type(data).__name__}.")
        check_observations(self.jepa, data)
        if self.goal_image is not None:
            image_window(data, self.goal_image)  # before an episode is played
        if not data.store.info.environment.get("id"):
            raise ValueError(
                f"{data.root} does not say which environment it was recorded in: write its recording.json with "
                '"environment": {"id": ...}, or record it with the command collect.'
            )
        for name in ("offset", "budget"):
            if getattr(self, name) % data.stride:
                raise ValueError(f"model.{name}={getattr(self, name)}: give a multiple of data.stride={data.stride} frames.")
        low, high = data.store.info.action_low, data.store.info.action_high
        environment = Environment(settings_of(data.store.info))
        if not environment.num_choices and not (
            np.allclose(np.asarray(low), environment.low) and np.allclose(np.asarray(high), environment.high)
        ):
            raise ValueError(
                f"{data.root} has actions between {low} and {high}, and {environment.settings.id} takes "
                f"{environment.low} to {environment.high}: write action_low and action_high of "
                "the environment into its recording.json."
            )
        environment.close()
        unknown = [name for name in self.state_names or [] if name not in data.state_names]
        if unknown or (self.radius is not None and not data.state_names):
            raise ValueError(f"model.state={unknown}: the recording has {', '.join(data.state_names) or 'no states'}.")

    @property
    def data(self) -> Any:
        """The data module."""
        return getattr(self.trainer, "datamodule", None)

    def test_step(self, batch: ClipBatch, batch_idx: int) -> None:
        """Nothing: episodes are played at the end."""

    def _columns(self) -> list[int]:
        """Columns of the state whose distance counts."""
        names = self.data.state_names
        return [names.index(name) for name in self.state_names or names]

    def distance(self, states: Any, goals: Any) -> NDArray[np.float64]:
        """Euclidean distance of the named scalars: (..., L) twice -> (...)."""
        columns = self._columns()
        return np.linalg.norm(np.asarray(states, np.float64)[..., columns] - np.asarray(goals)[..., columns], axis=-1)

    def _is_trivial(self, goal: Goal) -> bool:
        states: Any = goal.episode.states
        return self.radius is not None and bool(self.distance(states[goal.start], states[goal.end]) <= self.radius)

    @staticmethod
    def _goal_states(goals: list[Goal]) -> NDArray[np.float32]:
        """States of the goals, (E, L)."""
        return np.stack([goal.episode.states[goal.end] for goal in goals if goal.episode.states is not None])

    def _goal_windows(self, goals: list[Goal]) -> tuple[Tensor, Tensor | None]:
        """Windows (E, 1, ...) of the goals, and their vectors where both are observed."""
        if self.goal_image is None:
            return goal_windows(self.data, goals)
        return image_window(self.data, self.goal_image).expand(len(goals), *[-1] * 4), None

    def controllers(self, goals: list[Goal]) -> dict[str, Controller]:
        """Who acts, by name."""
        data, steps = self.data, self.budget // self.data.stride
        horizon = self.horizon or self.offset // data.stride
        windows, vectors = self._goal_windows(goals)
        windows, vectors = windows.to(self.device), None if vectors is None else vectors.to(self.device)
        states = None if self.radius is None else self._goal_states(goals)

        def planning(look: Callable[[Any], Any], planner: Planner, every: int = 1, device: Any = "cpu") -> Planning:
            deadline = steps if self.at_end else None
            return Planning(planner, look, horizon, torch.Generator(device).manual_seed(data.seed), deadline, every, True)

        def model(jepa: Any, every: int = 1) -> Planning:
            return planning(Imagination(jepa, windows, self.planner, vectors), self.planner, every, self.device)

        found: dict[str, Controller] = {"world_model": model(self.jepa)}
        if self.inverse is not None:
            found["inverse"] = InverseController(self.inverse, windows, vectors)
        makers: dict[str, Callable[[], Controller]] = {
            "one_plan": lambda: Once(model(self.jepa, every=horizon), horizon),
            "replay": lambda: Replay([actions_of(g.episode, g.start, self.offset // data.stride, data) for g in goals]),
            "zero": Zero,
            "random": lambda: Random(torch.Generator().manual_seed(data.seed)),
            "untrained": lambda: model(self.untrained),
            "oracle": lambda: planning(SimulatorOracle(lambda now: self.distance(now, states)), ORACLE),
        }
        for name in self.baselines:
            if name == "replay" and self.goal_image is not None:
                rank_zero_info("replay: left out, since the recorded actions do not lead to model.goal_image.")
                continue
            if name == "oracle" and (states is None or not self._environments[0].can_be_set):
                rank_zero_info("oracle: left out, since the simulator cannot be set, or model.radius is not given.")
                continue
            found[name] = makers[name]()
        return {name: found[name] for name in found if steps > 0}

    def _away(self, world: EnvironmentWorld, goals: list[Goal]) -> NDArray[np.float64]:
        """Distances of what is seen now from the goal image, in embedding space, (E,)."""
        goal = self._goal_windows(goals)[0]
        now, there = (self.jepa.encode(windows.to(self.device))[:, 0] for windows in (world.window(), goal))
        return (now - there).norm(dim=-1).double().cpu().numpy()

    def play(self, goals: list[Goal]) -> tuple[dict[str, dict[str, list[Any]]], np.ndarray | None]:
        """Episodes of some goals under every controller.

        Returns:
            For each controller and episode, "success", "seconds" of a decision and, with a goal image, the distances "first"
            and "last" from it in embedding space; and a film of the first episode.
        """
        steps = self.budget // self.data.stride
        found: dict[str, dict[str, list[Any]]] = {}
        film = None
        for name, controller in self.controllers(goals).items():
            timed = Timed(controller)
            world = EnvironmentWorld(self.data, self._environments[: len(goals)], filmed=1 if name == "world_model" else 0)
            for number, goal in enumerate(goals):
                assert goal.episode.seed is not None
                world.begin(number, goal.episode.seed, goal.episode.actions[: goal.start])
                check_replay(world, number, goal.episode, goal.start)
            before = None if self.goal_image is None else self._away(world, goals)
            run(world, timed, steps)
            seconds = [timed.seconds / steps / len(goals)] * len(goals)
            found[name] = {"success": self.reached(world, goals), "seconds": seconds}
            if before is not None:
                found[name] |= {"first": before.tolist(), "last": self._away(world, goals).tolist()}
            if name == "world_model" and self.data.observation != "vectors":
                film = self._film(world, goals[0])
        return found, film

    def reached(self, world: EnvironmentWorld, goals: list[Goal]) -> list[bool]:
        """Whether each episode has been at its goal, or is there at its end."""
        if self.radius is None:
            return world.ended.tolist()
        pairs = zip(world.states, self._goal_states(goals), strict=True)
        counted = slice(-1 if self.at_end else 0, None)
        return [bool((self.distance(np.stack(states)[counted], goal) <= self.radius).any()) for states, goal in pairs]

    def _film(self, world: EnvironmentWorld, goal: Goal) -> np.ndarray:
        frames = torch.from_numpy(np.stack(world.frames[0][self.data.history - 1 :])).float() / 255
        windows, _ = self._goal_windows([goal])
        image = windows[0, 0, -self.data.channels :]
        return side_by_side({"what happens": frames, "goal": image.expand_as(frames)})

    @torch.no_grad()
    def on_test_epoch_end(self) -> None:
        began = time.monotonic()
        goals = draw_goals(self.data, self.offset, self.num_episodes, self._is_trivial)
        settings = settings_of(self.data.store.info)
        self._environments = [Environment(settings) for _ in range(min(self.parallel, len(goals)))]
        self._environments[0].reset(self.data.seed)  # some have no state before
        rows: dict[str, dict[str, list[Any]]] = {}
        films = []
        for first in range(0, len(goals), self.parallel):
            found, film = self.play(goals[first : first + self.parallel])
            for name, figures in found.items():
                for figure, values in figures.items():
                    rows.setdefault(name, {}).setdefault(figure, []).extend(values)
            films += [] if film is None else [film]
            done = min(first + self.parallel, len(goals))
            rank_zero_info(f"{done} of {len(goals)} episodes: {sum(rows['world_model']['success'])} at their goal.")
        for environment in self._environments:
            environment.close()
        summary = {name: goal_figures(row) for name, row in rows.items()}
        directory = Path(self.trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        if films:
            write_video(directory / "goals.mp4", np.concatenate(films), frames_per_second=10)
            show(self.trainer, "goals/video", np.concatenate(films))
        named = ("offset", "budget", "radius", "at_end", "goal_image")
        task = {name: getattr(self, name) for name in named} | {"state": self.state_names}
        report = {"goals": summary, "episodes": len(goals), "task": task, "planner": vars(self.planner)}
        report |= {"data": self.data.dynamics, "checkpoint": self.checkpoint, "seconds": time.monotonic() - began}
        notes = f"Of `{self.checkpoint}` in {settings.id}: {goal_notes(task, len(goals))}"
        save_report(directory, report, "Goals", notes, goal_table(summary))
