"""Decoders from a feature to what was observed."""

import torch
from torch import Tensor, nn

from jepa_lightning.networks.mlp import mlp


class ConvDecoder(nn.Module):
    """A linear map to a 4 x 4 feature map, then transposed convolutions, each doubling it, to a picture in (0, 1).

    Args:
        dim: D, width of the feature.
        image_size: S, a power of two of at least 8.
        channels: C of the picture.
        width: Channels of the last feature map; each earlier one has twice as many.
    """

    def __init__(self, dim: int, image_size: int, channels: int, width: int) -> None:
        super().__init__()
        if image_size < 8 or image_size & (image_size - 1):
            raise ValueError(f"image_size={image_size}: the decoder needs a power of two of at least 8.")
        doublings = image_size.bit_length() - 3
        widths = [width * 2**i for i in reversed(range(doublings))]
        layers: list[nn.Module] = [nn.Linear(dim, widths[0] * 16), nn.Unflatten(1, (widths[0], 4, 4)), nn.ReLU()]
        for inputs, outputs in zip(widths, [*widths[1:], channels], strict=True):
            layers += [nn.ConvTranspose2d(inputs, outputs, kernel_size=4, stride=2, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1], nn.Sigmoid())
        self.to(memory_format=torch.channels_last)

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, C, S, S)."""
        return self.layers(features)


class MLPDecoder(nn.Module):
    """Fully connected layers to a vector, or to a picture in (0, 1).

    Args:
        dim: D, width of the feature.
        output_shape: Of one sample, (4,) or (C, S, S).
        hidden_dims: Widths of the hidden layers.
    """

    def __init__(self, dim: int, output_shape: tuple[int, ...], hidden_dims: tuple[int, ...]) -> None:
        super().__init__()
        size = int(torch.tensor(output_shape).prod())
        squash: list[nn.Module] = [nn.Sigmoid()] if len(output_shape) == 3 else []
        self.layers = nn.Sequential(mlp(dim, hidden_dims, size), nn.Unflatten(1, output_shape), *squash)

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, *output_shape)."""
        return self.layers(features)
