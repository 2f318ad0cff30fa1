"""A goal-conditioned inverse model: which action leads from one embedding towards another, without a search?

Shapes: B batch, T windows, P pairs, E episodes, D embedding dimension, A scalars of an action.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from datamodules.batches import ClipBatch
from jepa_lightning.dynamics import DynamicsJEPA
from jepa_lightning.networks.mlp import mlp
from jepa_lightning.probes.dynamics.decoder import StandardizedDecoder
from jepa_lightning.probes.dynamics.episodes import World
from jepa_lightning.probes.dynamics.world_model_probe import SCALED_ON, WorldModelProbe, check_same
from jepa_lightning.weights.checkpoints import load_probe


class InverseModel(WorldModelProbe):
    """Regress the next action from the embeddings of now and of a later window of the same clip (hindsight).

    One call of a small network takes the place of a search: as in GC-IDM on frozen latents (arXiv 2605.08732). It averages
    over all ways that lead to a goal, which suits an expert's data better than random actions. The error is compared with
    that of the mean action ("val/error_over_mean").

    Args:
        checkpoint: Path of the checkpoint of a dynamics JEPA with actions, written by `fit`.
        width: Width of the two hidden layers.
        learning_rate: Peak learning rate.
        weight_decay: Weight decay of matrices.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, holds no world model with actions, or an argument is out of its range.
    """

    def __init__(self, checkpoint: str, width: int = 512, learning_rate: float = 1e-3, weight_decay: float = 1e-4) -> None:
        super().__init__(checkpoint, learning_rate, weight_decay)
        self.save_hyperparameters()
        if width < 1:
            raise ValueError(f"model.width={width}: give an integer of at least 1.")
        inputs = 2 * self.jepa.latent_dim
        self.network = StandardizedDecoder(mlp(inputs, (width, width), self.jepa.action_dim), inputs)

    def on_fit_start(self) -> None:
        if self.trainer.ckpt_path is None:  # a resumed run has its scales
            data: Any = self.trainer.datamodule
            self.network.fit_scale(self._pairs(data.first_clips(SCALED_ON, self.device))[0])

    @torch.no_grad()
    def _pairs(self, batch: ClipBatch) -> tuple[Tensor, Tensor]:
        """Embeddings of each window and each later one of its clip, (P, 2 D), and the action after the first, (P, A)."""
        assert batch.actions is not None
        features = self.jepa.encode_batch(batch)  # (B, T, D)
        now, later = torch.triu_indices(features.shape[1], features.shape[1], offset=1, device=features.device)
        inputs = torch.cat([features[:, now], features[:, later]], dim=-1)
        return inputs.flatten(0, 1), batch.actions[:, now].flatten(0, 1)

    def loss(self, inputs: Tensor, actions: Tensor) -> Tensor:
        """Squared error of continuous actions, cross-entropy of discrete ones: a scalar."""
        guessed = self.network(inputs)
        choices = self.jepa.num_choices
        if not choices:
            return functional.mse_loss(guessed, actions)
        return functional.cross_entropy(guessed.unflatten(-1, (-1, choices)).flatten(0, 1), actions.view(-1, choices))

    @torch.no_grad()
    def act(self, features: Tensor, goals: Tensor) -> Tensor:
        """Actions (E, A) in [-1, 1] or one-hot, from embeddings (E, D) towards others (E, D)."""
        guessed = self.network(torch.cat([features, goals], dim=-1))
        choices = self.jepa.num_choices
        if not choices:
            return guessed.clamp(-1, 1)
        chosen = guessed.unflatten(-1, (-1, choices)).argmax(dim=-1)
        return functional.one_hot(chosen, choices).to(guessed.dtype).flatten(1)

    def training_step(self, batch: ClipBatch, batch_idx: int) -> Tensor:
        loss = self.loss(*self._pairs(batch))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: ClipBatch, batch_idx: int) -> None:
        inputs, actions = self._pairs(batch)
        self.log("val/loss", self.loss(inputs, actions), prog_bar=True, batch_size=len(inputs), sync_dist=True)
        if not self.jepa.num_choices:
            error = functional.mse_loss(self.network(inputs), actions) / actions.var(dim=0, unbiased=False).mean()
            self.log("val/error_over_mean", error, batch_size=len(inputs), sync_dist=True)


def load_inverse(path: str, jepa: DynamicsJEPA) -> InverseModel:
    """The inverse model in a checkpoint, in eval mode.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, or was fitted on another JEPA.
    """
    found = load_probe(path, InverseModel).requires_grad_(False)
    check_same(jepa, found.jepa, f"model.inverse={path} was fitted on another JEPA: fit it anew.")
    return found


class InverseController:
    """Chooses actions by an inverse model.

    Args:
        model: The model.
        goals: Windows of the goals, (E, 1, ...).
        goal_vectors: Vectors of the goals, for a model that observes both.
    """

    def __init__(self, model: InverseModel, goals: Tensor, goal_vectors: Tensor | None = None) -> None:
        self.model = model
        self.goal = model.jepa.encode(goals, goal_vectors)[:, 0]

    def __call__(self, world: World, step: int) -> Tensor:
        vectors = world.vectors()
        seen = world.window().to(self.goal), None if vectors is None else vectors.to(self.goal)
        return self.model.act(self.model.jepa.encode(*seen)[:, 0], self.goal)
