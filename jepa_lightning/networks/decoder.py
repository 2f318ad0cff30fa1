"""Decoders from a feature to what was observed.

Their outputs are not squashed into [0, 1]. Almost every pixel of the pendulum's pictures is black, and under a squared
error a sigmoid is driven so far towards zero in the first steps that its gradient never brings the pendulum back.
"""

import math

import torch
from torch import Tensor, nn

from jepa_lightning.networks.mlp import mlp


class ConvDecoder(nn.Module):
    """A hidden layer, a linear map to an 8 x 8 feature map, then transposed convolutions that double it to a picture.

    Args:
        dim: D, width of the feature.
        image_size: S, a power of two of at least 16.
        channels: C of the picture.
        width: Channels of the last feature map; each earlier one has twice as many.

    Raises:
        ValueError: A picture size that doubling does not reach.
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
    """Fully connected layers to a vector or a picture.

    Args:
        dim: D, width of the feature.
        output_shape: Of one sample, (4,) or (C, S, S).
        hidden_dims: Widths of the hidden layers.
    """

    def __init__(self, dim: int, output_shape: tuple[int, ...], hidden_dims: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.Sequential(mlp(dim, hidden_dims, math.prod(output_shape)), nn.Unflatten(1, output_shape))

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, *output_shape)."""
        return self.layers(features)
