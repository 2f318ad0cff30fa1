"""What a world model in time can do once it is trained: encode windows, roll out in latent space, plan.

Shapes: B batch, T windows in time, K steps, E episodes, H horizon, D embedding dimension, A scalars of an action, V scalars
of a vector.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from datamodules.batches import ClipBatch, as_clip_batch, as_pixels
from jepa_lightning.dynamics_checks import check_actions, check_clips, check_observations, sizes_of
from jepa_lightning.jepa import JEPA
from jepa_lightning.planner import Planner, latent_cost
from jepa_lightning.rollouts import unroll


class LatentDynamics(JEPA):
    """A world model in time: an encoder of windows, and a predictor of the embedding one step later.

    A subclass has the attributes below, and says how the two are learned.
    """

    observation: str
    image_size: int | tuple[int, int]
    channels: int
    history: int
    vector_dim: int
    action_dim: int
    num_choices: int
    latent_dim: int
    horizon: int

    trained_on: dict[str, Any]
    """`dynamics` of the data that it was trained on, if it comes from a checkpoint."""

    @property
    def unseen_windows(self) -> int:
        """Windows at the end of a clip that the context encoder does not see."""
        return 0

    @classmethod
    def for_data(cls, data: Any, **arguments: Any) -> Self:
        """A model for a data module, which says what observations and actions are like.

        Args:
            data: Data module with the attributes that this class's arguments name, such as a `Trajectories`.
            arguments: All other arguments.
        """
        return cls(**(sizes_of(data) | arguments))

    @property
    def sees_pixels(self) -> bool:
        """Whether images are observed."""
        return self.observation in ("pixels", "both")

    def mend_actions(self, theirs: int) -> str:
        """What to do if the data's actions have another number of scalars."""
        return f"set model.action_dim to {theirs}"

    def setup(self, stage: str) -> None:
        """Compare with the data module before anything runs.

        Raises:
            ValueError: Clips too short for the horizon or for a loss that compares windows, or observations or actions that
                the networks were not built for.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is None:
            return
        check_observations(self, data)
        check_clips(self, data)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        data: Any = getattr(self._trainer, "datamodule", None)
        checkpoint["trained_on"] = getattr(data, "dynamics", self.trained_on)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.trained_on = checkpoint.get("trained_on", {})
        data: Any = getattr(self._trainer, "datamodule", None)
        if data is not None:  # Lightning calls `setup` before it reads the checkpoint
            check_observations(self, data)

    def encode_windows(self, encoder: nn.Module, windows: Tensor, vectors: Tensor | None = None) -> Tensor:
        """Apply an encoder at all times: (B, T, ...), and (B, T, history * V) where both are observed -> (B, T, D)."""
        if windows.ndim == 5:  # windows overlap, and are copied once, in the order that convolutions want
            flat = windows.movedim(2, -1).flatten(0, 1).movedim(-1, 1)  # (B * T, history * C, H, W)
        else:
            flat = windows.flatten(0, 1)
        features = encoder(flat) if vectors is None else encoder(flat, vectors.flatten(0, 1))
        return features.unflatten(0, windows.shape[:2])

    @torch.no_grad()
    def encode(self, observations: Tensor, vectors: Tensor | None = None) -> Tensor:
        """Features of the target encoder, without gradient.

        Args:
            observations: Windows (B, T, history * C, H, W), pixels in [0, 1] or uint8; or vectors (B, T, history * V).
            vectors: Vectors next to pixels (B, T, history * V), for a model that observes both.

        Returns:
            (B, T, D).
        """
        return self.encode_windows(self.target_encoder, as_pixels(observations), vectors)

    def forward(self, observations: Tensor, vectors: Tensor | None = None) -> Tensor:
        return self.encode(observations, vectors)

    def encode_batch(self, batch: ClipBatch) -> Tensor:
        """Embeddings of the target encoder of all windows of a batch: (B, T, D)."""
        return self.encode(batch.observations, batch.vectors)

    def forecast(self, features: Tensor, horizon: int, actions: Tensor | None = None) -> Tensor:
        """Embeddings rolled out 1 ... H steps: (..., D), and actions (..., H, A) if action-conditioned -> (..., H, D)."""
        return unroll(self.predictor, features, horizon, actions)

    @torch.no_grad()
    def rollout(self, window: Tensor, steps: int, actions: Tensor | None = None, vectors: Tensor | None = None) -> Tensor:
        """Embeddings (B, K, D) of the next K steps, predicted (open loop).

        Args:
            window: Windows to start from, (B, ...).
            steps: Number of steps K.
            actions: Actions (B, K, A), if the model is action-conditioned.
            vectors: Vectors of the windows (B, history * V), for a model that observes both.
        """
        check_actions(actions, (len(window), steps, self.action_dim))
        return self.forecast(self._encode_one(window, vectors), steps, actions)

    def _encode_one(self, window: Tensor, vectors: Tensor | None) -> Tensor:
        return self.encode(window[:, None], None if vectors is None else vectors[:, None])[:, 0]

    @torch.no_grad()
    def plan(
        self,
        window: Tensor,
        goal: Tensor,
        horizon: int = 5,
        planner: Planner | None = None,
        seed: int = 0,
        vectors: Tensor | None = None,
        goal_vectors: Tensor | None = None,
    ) -> Tensor:
        """Actions (E, H, A) that lead from one window to another, by a search in embedding space.

        Args:
            window: (E, ...), where each of E episodes starts.
            goal: (E, ...), where it should end.
            horizon: Number of actions H.
            planner: Settings of the search; CEM by default.
            seed: Seed of the search.
            vectors: Vectors of `window`, for a model that observes both.
            goal_vectors: Vectors of `goal`, for a model that observes both.

        Returns:
            Actions in [-1, 1], or one-hot choices.
        """
        if not self.action_dim:
            raise ValueError("This model knows no actions (model.action_dim=0), so there is nothing to plan.")
        planner = planner or Planner()
        start, target = self._encode_one(window, vectors), self._encode_one(goal, goal_vectors)
        cost = latent_cost(self.predictor, start, target, planner.cost)
        generator = torch.Generator(start.device).manual_seed(seed)
        guess = start.new_zeros(len(start), horizon, self.action_dim)
        return planner.plan(cost, guess, generator, num_choices=self.num_choices)

    def as_batch(self, batch: Any, batch_idx: int) -> ClipBatch:
        """A `ClipBatch`: of windows, of (windows, actions) or of a dictionary."""
        return batch if isinstance(batch, ClipBatch) else as_clip_batch(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Embeddings of the target encoder: (B, T, D)."""
        return self.encode_batch(self.as_batch(batch, batch_idx))
