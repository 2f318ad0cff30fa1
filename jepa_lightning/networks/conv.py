"""A small convolutional encoder for pictures of the pendulum."""

import torch
from torch import Tensor, nn


class ConvEncoder(nn.Module):
    """Strided convolutions, then a linear map of the flattened feature map. No normalisation layers.

    The frames enter as the newest frame and the differences between neighbours. That is an invertible map of the stack,
    but it lets motion, a few per cent of the stack's variance, reach the first layer at full strength.

    Args:
        image_size: S, a multiple of 2 ** len(widths).
        channels: C of one frame.
        history: Frames per window, oldest first.
        widths: Channels of the convolutions; each halves the picture.
        output_dim: D.

    Raises:
        ValueError: A picture too small for the number of convolutions, or not divisible by their strides.
    """

    def __init__(self, image_size: int, channels: int, history: int, widths: tuple[int, ...], output_dim: int) -> None:
        super().__init__()
        factor = 2 ** len(widths)
        if image_size % factor or image_size < 2 * factor:
            raise ValueError(
                f"model.image_size={image_size} is too small or not divisible for an encoder of {len(widths)} halving "
                f"convolutions: choose a multiple of {factor} of at least {2 * factor}, or fewer encoder_widths."
            )
        self.channels = channels
        layers: list[nn.Module] = []
        inputs = history * channels
        for width in widths:
            layers += [nn.Conv2d(inputs, width, kernel_size=4, stride=2, padding=1), nn.ReLU()]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * (image_size // factor) ** 2, output_dim))
        # A third faster on CPUs and on tensor cores, and the same numbers.
        self.to(memory_format=torch.channels_last)

    def forward(self, windows: Tensor) -> Tensor:
        """(N, history * C, S, S) in [0, 1] -> (N, D)."""
        newest, older = windows[:, -self.channels :], windows[:, : -self.channels]
        differences = windows[:, self.channels :] - older
        return self.layers(torch.cat([newest, differences], dim=1).contiguous(memory_format=torch.channels_last))
