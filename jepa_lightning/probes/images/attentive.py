"""Evaluation of the frozen encoder: attentive probing.

Shapes: B batch, N patches, D embedding dimension.
"""

from typing import Any, Literal

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from datamodules.batches import ImageBatch
from jepa_lightning.figures import heat, rows_figure, show, to_colors, wants_figures
from jepa_lightning.probes.images.linear import ClassificationProbe

SHOWN = 8
"""Images in the figure."""


class AttentivePool(nn.Module):
    """A learned query attends to all patches: the average becomes a choice of where to look.

    Args:
        dim: Dimension D of the patch features.
        num_heads: Number of attention heads.
        num_classes: Number of classes of the linear layer.
    """

    def __init__(self, dim: int, num_heads: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.pool = AttentionPoolLatent(dim, num_heads=num_heads, norm_layer=nn.LayerNorm)
        self.classify = nn.Linear(dim, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, classes)."""
        return self.classify(self.pool(self.norm(tokens)))

    @torch.no_grad()
    def attention(self, tokens: Tensor) -> Tensor:
        """How much the query looks at each patch, averaged over heads: (B, N, D) -> (B, N), sums of 1."""
        pool, tokens = self.pool, self.norm(tokens)
        query = pool.q(pool.latent).view(-1, pool.num_heads, pool.head_dim)  # (1, heads, D / heads)
        keys = pool.kv(tokens)[..., : pool.num_heads * pool.head_dim].unflatten(-1, (pool.num_heads, pool.head_dim))
        scores = torch.einsum("qhd,bnhd->bhn", pool.q_norm(query), pool.k_norm(keys)) * pool.scale
        return scores.softmax(dim=-1).mean(dim=1)


class AttentiveProbe(ClassificationProbe):
    """Classifiers that attend to the patch features of frozen encoders: the I-JEPA's and the random-initialization baseline.

    One learned query, one cross-attention with an MLP behind it, one linear layer: what average pooling hides. `test`
    writes report.json and report.md.

    Args:
        checkpoint: Path of the checkpoint of an I-JEPA or IWM, written by `fit` or imported.
        num_classes: Number of classes of the data.
        encoder: Which encoder's features are read, "target" or "context".
        learning_rates: Peak learning rates of the grid, for AdamW.
        weight_decays: Weight decays of the grid.
        baselines: Whether to evaluate the random-initialization baseline.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, holds no such model, or an argument is out of its range.
    """

    names = {"attentive": "attention over the patches", "untrained": "randomly initialized encoder, the same"}  # noqa: RUF012
    own = ("attentive",)

    def __init__(
        self,
        checkpoint: str,
        num_classes: int | None = None,
        encoder: Literal["target", "context"] = "target",
        learning_rates: tuple[float, ...] = (3e-4, 1e-3),
        weight_decays: tuple[float, ...] = (0.05,),
        baselines: bool = True,
    ) -> None:
        super().__init__(checkpoint, num_classes, encoder, learning_rates, weight_decays, baselines)
        self.save_hyperparameters()

    def make_head(self, name: str, num_classes: int) -> nn.Module:
        return AttentivePool(self.encoder.dim, self.encoder.num_heads, num_classes)

    @torch.no_grad()
    def inputs(self, images: Tensor) -> dict[str, Tensor]:
        found = {"attentive": self.encoder(images)}
        return found | {"untrained": self.untrained(images)} if self.baselines else found

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if batch_idx == 0 and wants_figures(self.trainer) and not self.trainer.sanity_checking:
            self._show(batch.images[:SHOWN])

    def _show(self, images: Tensor) -> None:
        """Where the first classifier looks, as a figure."""
        head: Any = self.heads["attentive_0"]
        shown = to_colors(images, self.pixels)
        weights = head.attention(self.encoder(images).float())
        figure = rows_figure({"image": shown, "attention": heat(shown, weights, self.encoder.grid)})
        show(self.trainer, "attention", figure, self.global_step)

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups)
