"""Predictors of the features of hidden patches: I-JEPA's, and IWM's, which is conditioned on a transformation.

Shapes: B batch, N patches, K kept patches, M target blocks, L patches of a block, D embedding dimension.
"""

import math
from functools import partial
from typing import Any, Literal, get_args

import torch
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jepa_lightning.networks.mlp import mlp
from jepa_lightning.networks.vit import attend_by_device, sincos_positions

PredictorContext = Literal["repeated", "shared"]
Conditioning = Literal["feature", "sequence", "adaptive_norm", "none"]


def modulate(tokens: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Tokens (B, T, width) with their dimensions scaled by 1 + (B, 1, width) and shifted by (B, 1, width)."""
    return tokens * (1 + scale) + shift


class AdaptiveBlock(Block):
    """A transformer block whose norms and branches are scaled by a condition, norms shifted, too (Peebles and Xie 2023).

    At initialization the condition changes nothing, and the block is the transformer's own: DiT's starts as the identity.

    Args:
        width: Dimension of tokens and of the condition.
        num_heads: Number of attention heads.
        settings: Further arguments of timm's `Block`.
    """

    def __init__(self, width: int, num_heads: int, **settings: Any) -> None:
        super().__init__(width, num_heads, **settings)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, tokens: Tensor, mask: Tensor | None, condition: Tensor) -> Tensor:  # type: ignore[override]
        """Tokens (B, T, width) after attention and multilayer perceptron, under a condition (B, 1, width)."""
        scale, shift, gain, mlp_scale, mlp_shift, mlp_gain = self.modulation(condition).chunk(6, dim=-1)
        seen = self.attn(modulate(self.norm1(tokens), scale, shift), attn_mask=mask)
        tokens = tokens + (1 + gain) * seen
        return tokens + (1 + mlp_gain) * self.mlp(modulate(self.norm2(tokens), mlp_scale, mlp_shift))


class MaskedPredictor(nn.Module):
    """A narrow vision transformer that predicts the features of hidden patches from those of visible ones.

    Each target block is predicted on its own: its mask tokens, one shared vector plus their positions, see the context
    and each other but no other block.

    Args:
        grid: Number of patches per column and per row of the image, (H, W).
        dim: Dimension D of the encoder's features.
        width: Token dimension of the predictor.
        depth: Number of blocks.
        num_heads: Number of attention heads of each block; divides `width`.
        dropout: Dropout probability after the linear layers and in the attention's output.
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
        context: "repeated", as in the paper: the visible patches are computed anew for each target block, whose mask
            tokens they attend to; or "shared": they attend to themselves alone and are computed once for all blocks.

    Raises:
        ValueError: A width that the heads do not divide, or an unknown `context`.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        dim: int,
        width: int = 384,
        depth: int = 6,
        num_heads: int = 6,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
        context: PredictorContext = "repeated",
        block: type[Block] = Block,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"predictor_width={width} is not divisible by its {num_heads} heads: change one of them.")
        if context not in get_args(PredictorContext):
            raise ValueError(f"predictor_context={context!r}: choose one of {', '.join(get_args(PredictorContext))}.")
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.Sequential(
            *(block(width, num_heads, qkv_bias=True, proj_drop=dropout, norm_layer=norm) for _ in range(depth))
        )
        self.norm = norm(width)
        self.project = nn.Linear(width, dim)
        self.gradient_checkpointing, self.shares_context = gradient_checkpointing, context == "shared"
        self.register_buffer("positions", sincos_positions(grid, width), persistent=False)
        self._initialize()
        attend_by_device(self)

    positions: Tensor

    def _initialize(self) -> None:
        """As the encoders: normal of 0.02, and the output layers of block l divided by sqrt(2 l)."""
        trunc_normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            for number, block in enumerate(self.blocks, start=1):
                block.attn.proj.weight /= math.sqrt(2 * number)
                block.mlp.fc2.weight /= math.sqrt(2 * number)
                if isinstance(block, AdaptiveBlock):
                    nn.init.zeros_(block.modulation.weight)

    def forward(self, features: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Predicted features of the target blocks.

        Args:
            features: Features of the visible patches, (B, K, D).
            context: Raster indices of the visible patches, (B, K).
            targets: Raster indices of the patches to predict, (B, M, L).

        Returns:
            (B, M, L, D).
        """
        visible = self.embed(features) + self.positions[context]  # (B, K, width)
        hidden = self.mask_token + self.positions[targets.flatten(1)]  # (B, M * L, width)
        return self._predict(visible, hidden, targets.shape[1])

    def _predict(self, visible: Tensor, hidden: Tensor, num_blocks: int, *condition: Tensor, num_read: int = 0) -> Tensor:
        """Features predicted at the mask tokens of M blocks, and at visible tokens that are read as well.

        Args:
            visible: What all mask tokens of an image attend to, (B, K, width).
            hidden: Mask tokens, one block after the other, (B, M * L, width).
            num_blocks: Number of blocks M.
            condition: What the blocks are given besides, if they are conditioned: (B, 1, width).
            num_read: How many of the visible tokens, the last ones, are read as well, R; 0 but for M = 1.

        Returns:
            (B, M, L, D), or (B, 1, R + L, D).
        """
        length = hidden.shape[1] // num_blocks
        mask = None
        if self.shares_context:
            allowed = shared_context_mask(visible.shape[1], num_blocks, length, hidden.device)
            # To be added to the scores: not all versions of timm know masks of truth values.
            mask = torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device).masked_fill_(~allowed, -torch.inf)
        else:  # an image of its own for each block
            visible = visible.repeat_interleave(num_blocks, dim=0)
            hidden = hidden.reshape(len(visible), length, hidden.shape[2])
            condition = tuple(part.repeat_interleave(num_blocks, dim=0) for part in condition)
        tokens = torch.cat([visible, hidden], dim=1)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                tokens = checkpoint(block, tokens, mask, *condition, use_reentrant=False)
            else:
                tokens = block(tokens, mask, *condition)
        predicted = self.read_out(tokens[:, visible.shape[1] - num_read :], *condition)
        return predicted.reshape(-1, num_blocks, num_read + length, predicted.shape[-1])

    def read_out(self, tokens: Tensor, *condition: Tensor) -> Tensor:
        """Features of tokens after the last block: (B, T, width) -> (B, T, D)."""
        return self.project(self.norm(tokens))


def shared_context_mask(visible: int, num_blocks: int, length: int, device: torch.device) -> Tensor:
    """Who attends to whom where the context is shared: K visible patches, then M blocks of L mask tokens.

    All attend to the visible patches, and mask tokens to those of their own block, too.

    Returns:
        (K + M * L, K + M * L), bool, true where the row attends to the column.
    """
    own = torch.arange(num_blocks, device=device).repeat_interleave(length)
    mask = torch.zeros(visible + len(own), visible + len(own), dtype=torch.bool, device=device)
    mask[:, :visible] = True
    mask[visible:, visible:] = own[:, None] == own
    return mask


class WorldModel(MaskedPredictor):
    """An action-conditioned masked predictor: what a change does to the features of an image (Garrido et al. 2024).

    Args:
        grid: Number of patches per column and per row of the image, (H, W).
        dim: Dimension D of the encoder's features.
        action_dim: Number of scalars of an action, A.
        conditioning: "feature" joins the action to each mask token, with `predict_visible` to visible ones, too, and a
            network of three layers mixes the two; "sequence" makes a token of each scalar, with a projection of its own;
            "adaptive_norm" scales and shifts the norms of all blocks by it (`AdaptiveBlock`; beyond the paper); "none"
            leaves the action out.
        width: Token dimension of the predictor.
        depth: Number of blocks.
        num_heads: Number of attention heads of each block; divides `width`.
        dropout: Dropout probability after the linear layers and in the attention's output.
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
        predict_visible: It is trained to predict visible patches, too, at their own tokens: what is to be changed is there
            already, and need not be found by a mask token (as V-JEPA 2.1 predicts its context; beyond the paper).

    Raises:
        ValueError: A width that the heads do not divide, or an unknown conditioning.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        dim: int,
        action_dim: int,
        conditioning: Conditioning,
        width: int = 384,
        depth: int = 18,
        num_heads: int = 12,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
        predict_visible: bool = False,
    ) -> None:
        block = AdaptiveBlock if conditioning == "adaptive_norm" else Block
        super().__init__(grid, dim, width, depth, num_heads, dropout, gradient_checkpointing, block=block)
        if conditioning not in get_args(Conditioning):
            raise ValueError(f"conditioning={conditioning!r}: choose one of {', '.join(get_args(Conditioning))}.")
        self.conditioning, self.action_dim, self.predict_visible = conditioning, action_dim, predict_visible
        if conditioning == "feature":
            self.mix = mlp(width + action_dim, (width, width), width)
        elif conditioning == "sequence":
            self.action_weight = nn.Parameter(0.02 * torch.randn(action_dim, width))
            # Attention does not know the order of its tokens: the bias says which scalar this is.
            self.action_token = nn.Parameter(0.02 * torch.randn(action_dim, width))
        elif conditioning == "adaptive_norm":
            self.condition = nn.Sequential(mlp(action_dim, (width,), width), nn.SiLU())
            self.modulation = nn.Linear(width, 2 * width)
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(
        self,
        features: Tensor,
        context: Tensor,
        targets: Tensor,
        actions: Tensor | None = None,
        further: Tensor | None = None,
        with_context: bool = False,
    ) -> Tensor:
        """Predicted features of the target blocks after an action.

        Args:
            features: Features of the visible patches, (B, K, D).
            context: Raster indices of the visible patches, (B, K).
            targets: Raster indices of the patches to predict, (B, M, L).
            actions: Actions, (B, A); no change by default.
            further: Further tokens that all others attend to, such as one that names a task, (E, width).
            with_context: Predict the visible patches as well, at their own tokens: they come first. With M = 1 alone.

        Returns:
            (B, M, L, D), or (B, 1, K + L, D) with the context.
        """
        visible = self.embed(features) + self.positions[context]  # (B, K, width)
        hidden = self.mask_token + self.positions[targets.flatten(1)]  # (B, M * L, width)
        condition: list[Tensor] = []
        actions = features.new_zeros(len(features), self.action_dim) if actions is None else actions
        if self.conditioning == "feature":
            hidden = self._mixed(hidden, actions)
            visible = self._mixed(visible, actions) if self.predict_visible else visible
        elif self.conditioning == "sequence":
            visible = torch.cat([actions[..., None] * self.action_weight + self.action_token, visible], dim=1)
        elif self.conditioning == "adaptive_norm":
            condition = [self.condition(actions)[:, None]]
        if further is not None:
            visible = torch.cat([further.expand(len(visible), -1, -1), visible], dim=1)
        num_read = context.shape[1] if with_context else 0
        return self._predict(visible, hidden, targets.shape[1], *condition, num_read=num_read)

    def predict_all(self, features: Tensor, actions: Tensor | None = None, further: Tensor | None = None) -> Tensor:
        """Predicted features of all patches after an action, where all patches are seen: (B, N, D) -> (B, N, D).

        With `predict_visible` at their own tokens, and otherwise at mask tokens, as it is trained.

        Args:
            features: Features of all patches, in raster order.
            actions: As in `forward`.
            further: As in `forward`.
        """
        everywhere = torch.arange(len(self.positions), device=features.device).expand(len(features), -1)
        targets = everywhere[:, None, :0] if self.predict_visible else everywhere[:, None]
        return self(features, everywhere, targets, actions, further, with_context=self.predict_visible)[:, 0]

    def _mixed(self, tokens: Tensor, actions: Tensor) -> Tensor:
        """Tokens (B, T, width), each mixed with the action of its image, (B, A)."""
        return self.mix(torch.cat([tokens, actions[:, None].expand(-1, tokens.shape[1], -1)], dim=-1))

    def read_out(self, tokens: Tensor, *condition: Tensor) -> Tensor:
        tokens = self.norm(tokens)
        for part in condition:
            tokens = modulate(tokens, *self.modulation(part).chunk(2, dim=-1))
        return self.project(tokens)
