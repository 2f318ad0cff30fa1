"""Predictors of later embeddings.

Shapes: D embedding dimension.
"""

from typing import Literal

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from jepa_lightning.networks.mlp import mlp

PredictorName = Literal["residual", "prefix"]


class ResidualPredictor(nn.Module):
    """The embedding one step later: z + f(LayerNorm(z), action).

    The last layer of f starts at zero, so that an untrained predictor says "nothing changes" and its unrolled
    predictions stay finite at any horizon.

    Args:
        dim: Embedding dimension D.
        hidden_dim: Width of the two hidden layers.
        action_dim: Number of scalars of an action, A; 0 without actions.
        action_width: Width of the linear embedding of an action, which is joined to the input.
        dropout: Dropout probability after each hidden layer.
    """

    def __init__(self, dim: int, hidden_dim: int, action_dim: int = 0, action_width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        if action_dim:
            self.embed_action = nn.Linear(action_dim, action_width)
        self.change = mlp(dim + (action_width if action_dim else 0), (hidden_dim, hidden_dim), dim, dropout)
        for parameter in self.change[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor, actions: Tensor | None = None) -> Tensor:
        """(..., D), and (..., A) if conditioned on actions -> (..., D)."""
        inputs = self.norm(features)
        if actions is not None:
            inputs = torch.cat([inputs, self.embed_action(actions)], dim=-1)
        return features + self.change(inputs)


class PrefixPredictor(nn.Module):
    """The embeddings of several later steps, each from the first one and all actions since: a causal transformer.

    Step k attends to the embedding that the roll-out starts from and to actions 1 ... k, instead of taking what was
    predicted for step k - 1, so that errors do not add up over `length` steps (action prefixes as in Fast-LeWM, arXiv
    2606.26217). A longer roll-out starts anew from its own prediction after every `length` steps. The last layer starts at
    zero: an untrained predictor says "nothing changes".

    Args:
        dim: Embedding dimension D.
        width: Token dimension, a multiple of 32.
        action_dim: Number of scalars of an action, A; 0 without actions.
        length: Number of steps that are predicted from one embedding.
        depth: Number of blocks.
        dropout: Dropout probability in the blocks.

    Raises:
        ValueError: There are actions that it is not conditioned on, or none where it is.
    """

    def __init__(
        self, dim: int, width: int, action_dim: int = 0, length: int = 8, depth: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.length = length
        self.embed = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        self.embed_action = nn.Linear(action_dim, width) if action_dim else None
        self.step_token = nn.Parameter(trunc_normal_(torch.zeros(length, width), std=0.02))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, width // 32, 4 * width, dropout, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.change = nn.Linear(width, dim)
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)

    def unroll(self, features: Tensor, horizon: int, actions: Tensor | None = None) -> Tensor:
        """Embeddings 1 ... H steps later: (..., D), and (..., H, A) if conditioned on actions -> (..., H, D)."""
        found: list[Tensor] = []
        for first in range(0, horizon, self.length):
            steps = slice(first, min(horizon, first + self.length))
            start = found[-1][..., -1, :] if found else features
            found.append(self._predict(start, steps.stop - first, None if actions is None else actions[..., steps, :]))
        return torch.cat(found, dim=-2)

    def _predict(self, features: Tensor, steps: int, actions: Tensor | None) -> Tensor:
        if (actions is None) != (self.embed_action is None):
            raise ValueError(
                "This predictor is conditioned on " + ("nothing." if actions is not None else "actions: give some.")
            )
        tokens = self.step_token[:steps].expand(*features.shape[:-1], -1, -1)  # (..., K, width)
        if self.embed_action is not None:
            tokens = tokens + self.embed_action(actions)
        tokens = torch.cat([self.embed(features)[..., None, :], tokens], dim=-2)
        mask = nn.Transformer.generate_square_subsequent_mask(steps + 1, tokens.device, tokens.dtype)
        seen = tokens.reshape(-1, *tokens.shape[-2:])
        for block in self.blocks:
            seen = block(seen, mask, is_causal=True)
        return features[..., None, :] + self.change(self.norm(seen[:, 1:])).reshape(*tokens.shape[:-2], steps, -1)

    def forward(self, features: Tensor, actions: Tensor | None = None) -> Tensor:
        """The next embedding: (..., D), and (..., A) if conditioned on actions -> (..., D)."""
        return self._predict(features, 1, None if actions is None else actions[..., None, :])[..., 0, :]
