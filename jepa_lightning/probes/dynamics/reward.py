"""Rewards predicted from frozen embeddings, and planning for return.

Shapes: B batch, T windows, E episodes, N sampled sequences, H steps, D embedding dimension, A scalars of an action.
"""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import R2Score

from datamodules.batches import ClipBatch
from datamodules.environments import Environment, settings_of
from datamodules.trajectories import Trajectories
from jepa_lightning.figures import side_by_side, write_video
from jepa_lightning.networks.mlp import mlp
from jepa_lightning.planner import Cost, Planner, in_chunks
from jepa_lightning.probes.baselines import BASELINE_SEED
from jepa_lightning.probes.dynamics.decoder import StandardizedDecoder
from jepa_lightning.probes.dynamics.environment_world import EnvironmentWorld
from jepa_lightning.probes.dynamics.episodes import Controller, Planning, Random, World, Zero, run
from jepa_lightning.probes.dynamics.world_model_probe import SCALED_ON, WorldModelProbe
from jepa_lightning.probes.report import save_report

EPISODE_STREAM = 2**30
"""Use of the data's seed that no split and no epoch has: episodes that are planned for."""


class RewardProbe(WorldModelProbe):
    """Predict the reward of a step from a frozen embedding and the action, and plan for the sum of predicted rewards.

    `fit` trains the head; "val/r2" is on validation episodes, next to that of the same head on the random-initialization
    baseline ("val/r2_random_encoder"). `test` plays episodes in the environment that the data was recorded in, with a plan
    for the highest sum of predicted rewards at each step of the model, and writes report.json, report.md and return.mp4 next
    to zero and random actions.

    Args:
        checkpoint: Path of the checkpoint of a dynamics JEPA with actions, written by `fit`.
        width: Width of the head's two hidden layers.
        learning_rate: Peak learning rate.
        weight_decay: Weight decay of matrices.
        horizon: Steps of a plan H.
        planner: Planner that searches for action sequences; one with its defaults if None.
        num_episodes: Number of episodes E of a test.
        frames: Frames that an episode of a test takes.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, holds no world model with actions, or an argument is out of its range.
    """

    def __init__(
        self,
        checkpoint: str,
        width: int = 256,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-4,
        horizon: int = 10,
        planner: Planner | None = None,
        num_episodes: int = 10,
        frames: int = 200,
    ) -> None:
        super().__init__(checkpoint, learning_rate, weight_decay)
        self.save_hyperparameters(ignore=["planner", "horizon", "num_episodes", "frames"])  # those of a test are its own
        for name, value in {"width": width, "horizon": horizon, "num_episodes": num_episodes, "frames": frames}.items():
            if value < 1:
                raise ValueError(f"model.{name}={value}: give an integer of at least 1.")
        self.horizon, self.planner, self.num_episodes, self.frames = horizon, planner or Planner(), num_episodes, frames
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(BASELINE_SEED)
            untrained = self.jepa.build_encoder()
        self.encoders = nn.ModuleDict({"jepa": self.jepa.target_encoder, "random_encoder": untrained})
        self.encoders.requires_grad_(False).eval()
        inputs = self.jepa.latent_dim + self.jepa.action_dim
        self.heads = nn.ModuleDict(
            {name: StandardizedDecoder(mlp(inputs, (width, width), 1), inputs) for name in self.encoders}
        )
        self.register_buffer("scale", torch.ones(2))  # mean and standard deviation of the rewards
        self.scores = nn.ModuleDict({name: R2Score() for name in self.encoders})

    scale: Tensor

    def train(self, mode: bool = True) -> "RewardProbe":
        """Switch to training mode, all but the frozen networks."""
        super().train(mode)
        self.encoders.eval()
        return self

    def setup(self, stage: str) -> None:
        """Compare with the data module.

        Raises:
            ValueError: It is not that of the model, or has no rewards; for a test, it does not say where it was recorded.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, Trajectories):
            raise ValueError(f"RewardProbe needs recorded episodes: set data to Trajectories, not {type(data).__name__}.")
        super().setup(stage)
        if not data.store.widths["rewards"]:
            raise ValueError(f"{data.root} holds no rewards: record them, as the command collect does.")
        if stage == "test" and not data.store.info.environment.get("id"):
            raise ValueError(f"{data.root} does not say which environment it was recorded in: planning needs it.")
        if stage == "test" and self.trainer.world_size > 1:
            raise ValueError("The report is made in one process: set --trainer.devices 1.")

    def on_fit_start(self) -> None:
        if self.trainer.ckpt_path is not None:
            return  # a resumed run has its scales
        data: Any = self.trainer.datamodule
        inputs, rewards = self._examples(data.first_clips(SCALED_ON, self.device))
        self.scale.copy_(torch.stack([rewards.mean(), rewards.std().clamp(min=1e-6)]))
        for name, head in self.heads.items():
            head.fit_scale(inputs[name])

    @torch.no_grad()
    def _examples(self, batch: ClipBatch) -> tuple[dict[str, Tensor], Tensor]:
        """Embeddings joined to the action, of each encoder, (B * (T - 1), D + A), and the reward of the step."""
        assert batch.actions is not None and batch.rewards is not None
        found = {}
        for name, encoder in self.encoders.items():
            features = self.jepa.encode_windows(encoder, batch.observations, batch.vectors)[:, :-1]
            found[name] = torch.cat([features, batch.actions], dim=-1).flatten(0, 1)
        return found, batch.rewards.flatten()

    def reward(self, features: Tensor, actions: Tensor, name: str = "jepa") -> Tensor:
        """Predicted rewards (...) of actions (..., A) at embeddings (..., D), in the environment's units."""
        inputs = torch.cat([features, actions], dim=-1)
        return self.heads[name](inputs)[..., 0] * self.scale[1] + self.scale[0]

    def training_step(self, batch: ClipBatch, batch_idx: int) -> Tensor:
        inputs, rewards = self._examples(batch)
        goal = (rewards - self.scale[0]) / self.scale[1]
        losses = {name: functional.mse_loss(self.heads[name](inputs[name])[:, 0], goal) for name in inputs}
        self.log("train/loss", losses["jepa"], prog_bar=True)
        return torch.stack(list(losses.values())).sum()  # they share no parameter, so each is trained on its own

    def validation_step(self, batch: ClipBatch, batch_idx: int) -> None:
        inputs, rewards = self._examples(batch)
        goal = (rewards - self.scale[0]) / self.scale[1]
        for name in inputs:
            guessed = self.heads[name](inputs[name])[:, 0]
            self.scores[name].update(guessed, goal)
            if name == "jepa":
                error = functional.mse_loss(guessed, goal)
                self.log("val/loss", error, prog_bar=True, batch_size=len(goal), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        for name, score in self.scores.items():
            self.log("val/r2" if name == "jepa" else f"val/r2_{name}", score.compute())
            score.reset()

    def test_step(self, batch: ClipBatch, batch_idx: int) -> None:
        """Nothing: episodes are played at the end."""

    @torch.no_grad()
    def on_test_epoch_end(self) -> None:
        data: Any = self.trainer.datamodule
        steps, began = self.frames // data.stride, time.monotonic()
        settings = settings_of(data.store.info)
        environments = [Environment(settings) for _ in range(self.num_episodes)]
        generator = torch.Generator(self.device).manual_seed(data.seed)
        controllers: dict[str, Controller] = {
            "world_model": Planning(self.planner, Foresight(self), self.horizon, generator),
            "zero": Zero(),
            "random": Random(torch.Generator().manual_seed(data.seed)),
        }
        figures: dict[str, dict[str, float]] = {}
        directory = Path(self.trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        for name, controller in controllers.items():
            world = EnvironmentWorld(data, environments, filmed=1 if name == "world_model" else 0)
            for number in range(self.num_episodes):
                seed = int(np.random.SeedSequence((data.seed, EPISODE_STREAM, number)).generate_state(1)[0] >> 1)
                world.begin(number, seed, np.zeros((0, 1)))
            run(world, controller, steps)
            error = float(world.rewards.std(ddof=1)) / math.sqrt(self.num_episodes) if self.num_episodes > 1 else math.nan
            figures[name] = {"return": float(world.rewards.mean()), "standard_error": error}
            rank_zero_info(f"{name}: return {figures[name]['return']:.1f} (standard error {error:.1f})")
            if world.filmed and data.observation != "vectors":
                frames = torch.from_numpy(np.stack(world.frames[0])).float() / 255
                write_video(directory / "return.mp4", side_by_side({"what happens": frames}), frames_per_second=20)
        for environment in environments:
            environment.close()
        lines = ["| actions | return | standard error |", "| :-- | --: | --: |"]
        for name, title in {"world_model": "planned for predicted rewards", "zero": "zero", "random": "random"}.items():
            lines.append(f"| {title} | {figures[name]['return']:.1f} | {figures[name]['standard_error']:.1f} |")
        report = {"returns": figures, "episodes": self.num_episodes, "frames": self.frames, "horizon": self.horizon}
        report |= {"planner": vars(self.planner), "checkpoint": self.checkpoint, "seconds": time.monotonic() - began}
        notes = (
            f"Of `{self.checkpoint}` in {settings.id}: {self.num_episodes} episodes of {self.frames} frames from seeds of "
            f"their own, planned {self.horizon} steps of the model ahead, anew at each."
        )
        save_report(directory, report, "Return", notes, "\n".join(lines))


class Foresight:
    """Cost by a world model and a reward head: minus the sum of the predicted rewards.

    Args:
        probe: The fitted head and its world model.
    """

    def __init__(self, probe: RewardProbe) -> None:
        self.probe = probe

    def __call__(self, world: World) -> Cost:
        jepa, vectors = self.probe.jepa, world.vectors()
        window = world.window().to(self.probe.device)
        start = jepa.encode(window, None if vectors is None else vectors.to(window.device))[:, 0]

        def returned(actions: Tensor, features: Tensor) -> Tensor:
            features = features[:, None].expand(-1, actions.shape[1], -1)  # (E, N, D)
            later = jepa.forecast(features, actions.shape[2], actions)  # (E, N, H, D)
            met = torch.cat([features[:, :, None], later[:, :, :-1]], dim=2)  # where each action is applied
            return -self.probe.reward(met, actions).sum(dim=-1)

        return in_chunks(returned, start)
