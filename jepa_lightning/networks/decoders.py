"""Decoders from embeddings to what was observed.

Their outputs are not squashed into [0, 1]. Almost every pixel of the pendulum's images is black, and a squared error pushes
a sigmoid so far towards zero in the first steps that its gradient never brings the pendulum back.
"""

import math
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from jepa_lightning.networks.mlp import mlp
from jepa_lightning.networks.vit import attend_by_device, sincos_positions


class ConvDecoder(nn.Module):
    """A hidden layer, a linear map to an 8 x 8 feature map, then transposed convolutions that double it to an image.

    Args:
        dim: Embedding dimension D.
        image_size: Height and width S of the image in pixels, a power of two of at least 16.
        channels: Number of channels C of the image.
        width: Number of channels of the last feature map; each earlier one has twice as many.

    Raises:
        ValueError: An image size that doubling does not reach.
    """

    def __init__(self, dim: int, image_size: int, channels: int, width: int) -> None:
        super().__init__()
        doublings = int(math.log2(image_size)) - 3
        if doublings < 1 or image_size != 8 * 2**doublings:
            raise ValueError(f"image_size={image_size}: a 'conv' decoder needs a power of two of at least 16; choose 'mlp'.")
        widths = [width * 2**i for i in reversed(range(doublings))]
        layers: list[nn.Module] = [mlp(dim, (512,), widths[0] * 64), nn.Unflatten(1, (widths[0], 8, 8))]
        for inputs, outputs in zip(widths, [*widths[1:], channels], strict=True):
            layers += [nn.SiLU(), nn.ConvTranspose2d(inputs, outputs, kernel_size=4, stride=2, padding=1)]
        self.layers = nn.Sequential(*layers)
        self.to(memory_format=torch.channels_last)

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, C, S, S)."""
        return self.layers(features)


class MLPDecoder(nn.Module):
    """Fully connected layers to a vector or an image.

    Args:
        dim: Embedding dimension D.
        output_shape: Shape of one sample, (4,) or (C, S, S).
        hidden_dims: Widths of the hidden layers.
    """

    def __init__(self, dim: int, output_shape: tuple[int, ...], hidden_dims: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.Sequential(mlp(dim, hidden_dims, math.prod(output_shape)), nn.Unflatten(1, output_shape))

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, *output_shape)."""
        return self.layers(features)


def tiled(patches: Tensor, grid: tuple[int, int], channels: int, size: int) -> Tensor:
    """Images from their patches, channels first in each: (B, N, C * size * size) -> (B, C, H, W)."""
    cut = patches.view(-1, *grid, channels, size, size)
    return cut.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)  # C, then rows, then columns


class PatchDecoder(nn.Module):
    """A small vision transformer that decodes an image from its patch features.

    Args:
        grid: Number of patches per column and per row of the image, (H, W).
        dim: Dimension D of the patch features.
        patch_size: Height and width of a patch in pixels.
        width: Token dimension of the transformer.
        depth: Number of blocks.
        channels: Number of channels C of the image.
    """

    def __init__(self, grid: tuple[int, int], dim: int, patch_size: int, width: int, depth: int, channels: int = 3) -> None:
        super().__init__()
        self.grid, self.patch_size, self.channels = grid, patch_size, channels
        self.embed = nn.Linear(dim, width)
        heads = max(1, width // 64)
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.paint = nn.Linear(width, channels * patch_size**2)
        self.register_buffer("positions", sincos_positions(grid, width), persistent=False)
        attend_by_device(self)

    positions: Tensor

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, D) -> (B, C, H, W)."""
        tokens = self.norm(self.blocks(self.embed(features) + self.positions))
        return tiled(self.paint(tokens), self.grid, self.channels, self.patch_size)

    def patches(self, images: Tensor) -> Tensor:
        """Images cut into patches, channels first: (B, C, H, W) -> (B, N, C * patch pixels)."""
        size = self.patch_size
        cut = images.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, C, rows, size, columns, size)
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class LatentDecoder(nn.Module):
    """A transformer that decodes an image from a single embedding.

    A learned query per patch asks what lies there; the embedding answers through several memory tokens. With one token, as
    an earlier system had it, the attention would have nothing to choose from.

    Args:
        dim: Embedding dimension D.
        image_size: Height and width of the image in pixels, multiples of `patch_size`.
        channels: Number of channels C of the image.
        width: Token dimension of the transformer, a multiple of 32.
        depth: Number of layers of the transformer.
        patch_size: Height and width of a patch in pixels.
        num_memory_tokens: Number of memory tokens that the embedding is mapped to.

    Raises:
        ValueError: Patches that do not tile the image.
    """

    def __init__(
        self,
        dim: int,
        image_size: tuple[int, int],
        channels: int,
        width: int,
        depth: int,
        patch_size: int = 8,
        num_memory_tokens: int = 8,
    ) -> None:
        super().__init__()
        if any(side % patch_size for side in image_size):
            raise ValueError(
                f"image_size={list(image_size)}: this decoder draws patches of {patch_size} pixels; choose multiples."
            )
        self.channels, self.patch_size = channels, patch_size
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.remember = nn.Sequential(nn.Linear(dim, num_memory_tokens * width), nn.Unflatten(1, (num_memory_tokens, width)))
        self.query_token = nn.Parameter(sincos_positions(self.grid, width))
        settings: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(width, max(1, width // 32), 4 * width, **settings) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.paint = nn.Linear(width, channels * patch_size**2)

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, C, H, W)."""
        memory = self.remember(features)
        tokens = self.query_token.expand(len(features), -1, -1)
        for layer in self.layers:
            tokens = layer(tokens, memory)
        return tiled(self.paint(self.norm(tokens)), self.grid, self.channels, self.patch_size)
