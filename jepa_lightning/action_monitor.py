"""What a validation of an IWM watches: whether its predictor listens to actions, and what its embeddings keep of them.

Shapes: B batch, D embedding dimension, A scalars of an action.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.batches import ViewBatch
from datamodules.preprocessing import denormalize
from jepa_lightning.figures import show, wants_figures
from jepa_lightning.mean_reciprocal_rank import ActionProbe, MeanReciprocalRanks, bank_generator, nearest_figure
from jepa_lightning.sharding import is_sharded

WATCHED = 8
"""Images whose versions are ranked at each validation, with 256 versions each."""


class ActionMonitor(nn.Module):
    """Mean reciprocal ranks of some images of a validation, and the R2 of actions from pairs of embeddings.

    Args:
        dim: Embedding dimension D.
        action_dim: Number of scalars of an action, A.
    """

    def __init__(self, dim: int, action_dim: int) -> None:
        super().__init__()
        self.ranks = MeanReciprocalRanks()
        self.action_probe = ActionProbe(dim, action_dim)

    def update(self, sources: Tensor, targets: Tensor, actions: Tensor) -> None:
        """Add pooled embeddings of source and target views, (B, D), and the actions between them, (B, A)."""
        self.action_probe.update(sources, targets, actions)

    def rank(self, jepa: Any, batch: ViewBatch) -> None:
        """Rank versions of the first images of a batch, and show the nearest.

        Args:
            jepa: An IWM in validation.
            batch: Pairs of views with their images.
        """
        trainer, views = jepa.trainer, jepa.trainer.datamodule.views
        sharded = is_sharded(jepa.predictor)  # sharded networks compute in all processes or in none
        images = batch.images
        assert images is not None
        count = len(images)
        if sharded:
            count = int(trainer.strategy.reduce(torch.tensor(count, device=jepa.device), reduce_op="min"))
        for number, image in enumerate(denormalize(images[:count][:WATCHED], jepa.pixels)):
            generator = bank_generator(batch, number, trainer.world_size)
            self.ranks.update(jepa, image, views, generator, each=False)
        if wants_figures(trainer) or sharded:
            figure = nearest_figure(jepa, images[:count][:2], views, batch.key)
            show(trainer, "nearest versions", figure, jepa.global_step)

    def compute(self, names: Sequence[str]) -> dict[str, float | Tensor]:
        """Scalars by name; the next validation starts anew.

        Args:
            names: What the scalars of an action are called.
        """
        ranks = self.ranks.compute().mean
        found: dict[str, float | Tensor] = {
            "mrr": ranks["patch"]["overall"],
            "mrr_pooled": ranks["pooled"]["overall"],
            "mrr_shuffled_actions": ranks["patch"]["shuffled_actions"],
        }
        r2 = self.action_probe.compute()
        found |= {f"action_r2_{name}": value for name, value in zip(names, r2, strict=True)}
        self.reset()
        return found

    def reset(self) -> None:
        """Forget the batches so far."""
        self.ranks.reset()
        self.action_probe.reset()
