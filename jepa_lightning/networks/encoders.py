"""Encoders of a window: a few consecutive images, vectors of scalars, or both, become one embedding."""

import math
from functools import partial
from typing import Any, Literal, get_args

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from jepa_lightning.networks.conv import ConvEncoder
from jepa_lightning.networks.mlp import mlp
from jepa_lightning.networks.vit import attend_by_device, sincos_positions

EncoderName = Literal["cnn", "mlp", "vit"]

PATCH_SIZE, HEAD_WIDTH = 8, 32
"""Patch size of the vision transformer in pixels, and width of its attention heads in channels."""

DEFAULT_WIDTHS = {"cnn": (16, 32, 64), "mlp": (512, 512), "vit": (96, 96, 96, 96)}


class PixelsAndVectors(nn.Module):
    """An encoder of images and one of vectors (proprioception), whose outputs a linear layer joins.

    Args:
        pixels: Encoder of images, (N, history * C, H, W) -> (N, D).
        vectors: Encoder of vectors, (N, history * V) -> (N, D).
        dim: Embedding dimension D.
    """

    def __init__(self, pixels: nn.Module, vectors: nn.Module, dim: int) -> None:
        super().__init__()
        self.pixels, self.vectors = pixels, vectors
        self.join = nn.Linear(2 * dim, dim)

    def forward(self, windows: Tensor, vectors: Tensor) -> Tensor:
        """(N, history * C, H, W) and (N, history * V) -> (N, D)."""
        return self.join(torch.cat([self.pixels(windows), self.vectors(vectors)], dim=-1).relu())


def observation_encoder(
    name: EncoderName | None,
    widths: tuple[int, ...] | None,
    image: tuple[int, int, int] | None,
    vectors: int | None,
    dim: int,
) -> nn.Module:
    """A freshly initialized encoder of images, of vectors, or of both.

    Args:
        name: As for `window_encoder`, of the images if there are any; "cnn" for images and "mlp" for vectors by default.
        widths: As for `window_encoder`.
        image: Shape (history * C, H, W) of a window of images, or None without images.
        vectors: Number of scalars of a window of vectors, history * V, or None without vectors.
        dim: Embedding dimension D.
    """
    if image is None:
        assert vectors is not None
        return window_encoder(name or "mlp", (vectors,), widths, dim)
    pixels = window_encoder(name or "cnn", image, widths, dim)
    return pixels if vectors is None else PixelsAndVectors(pixels, window_encoder("mlp", (vectors,), None, dim), dim)


def window_encoder(name: EncoderName, shape: tuple[int, ...], widths: tuple[int, ...] | None, output_dim: int) -> nn.Module:
    """A freshly initialized encoder: (N, *shape) -> (N, output_dim).

    Args:
        name: "cnn" for strided convolutions, "mlp" for fully connected layers, "vit" for a vision transformer on patches
            of 8 pixels, averaged over the patches.
        shape: Shape of one window: (history * C, H, W) in pixels, or (history * V,) scalars.
        widths: Channels of the convolutions, widths of the hidden layers, or the width of each block of the transformer,
            all alike; those of `DEFAULT_WIDTHS` by default.
        output_dim: Embedding dimension D.

    Raises:
        ValueError: An unknown name, an encoder of images for vectors, or widths that it cannot have.
    """
    if name not in get_args(EncoderName):
        raise ValueError(f"model.encoder={name!r}: choose one of {', '.join(get_args(EncoderName))}.")
    widths = DEFAULT_WIDTHS[name] if widths is None else widths
    if not widths or min(widths) < 1:
        raise ValueError(f"model.encoder_widths={widths}: give integers of at least 1, one a layer.")
    if name == "mlp":
        layers = mlp(math.prod(shape), widths, output_dim)
        return layers if len(shape) == 1 else nn.Sequential(nn.Flatten(), layers)
    if len(shape) == 1:
        raise ValueError(f"model.encoder={name!r} reads images, and there are only vectors: choose 'mlp'.")
    channels, *image_size = shape
    if name == "cnn":
        return ConvEncoder((image_size[0], image_size[1]), channels, widths, output_dim)
    return _vision_transformer((image_size[0], image_size[1]), channels, widths, output_dim)


def _vision_transformer(image_size: tuple[int, int], channels: int, widths: tuple[int, ...], output_dim: int) -> nn.Module:
    if len(set(widths)) > 1 or widths[0] % HEAD_WIDTH:
        raise ValueError(
            f"model.encoder_widths={widths}: the blocks of a 'vit' are all of one width, a multiple of {HEAD_WIDTH}, such "
            "as [96, 96, 96, 96]."
        )
    if any(side % PATCH_SIZE for side in image_size):
        raise ValueError(
            f"model.image_size={list(image_size)}: a 'vit' cuts patches of {PATCH_SIZE} pixels; choose a multiple."
        )
    norm: Any = partial(nn.LayerNorm, eps=1e-6)
    network = VisionTransformer(
        img_size=image_size,
        patch_size=PATCH_SIZE,
        in_chans=channels,
        num_classes=output_dim,
        global_pool="avg",
        class_token=False,
        embed_dim=widths[0],
        depth=len(widths),
        num_heads=widths[0] // HEAD_WIDTH,
        norm_layer=norm,
    )
    grid = (image_size[0] // PATCH_SIZE, image_size[1] // PATCH_SIZE)
    network.pos_embed = nn.Parameter(sincos_positions(grid, widths[0])[None], requires_grad=False)
    attend_by_device(network)
    return network
