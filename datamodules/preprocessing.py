"""From the pixels of a file to what encoders take: the middle of an image, normalized."""

import io
import math
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from datamodules.decoding import Source, read_image, upright_pixels_of
from datamodules.pixel_format import PixelFormat

CENTER_CROP = 0.875
"""Side of the central crop that held-out images are cut to, as a fraction of the resized image: 224 of 256."""

LONGEST = 16
"""How much of a long image is resized, in sides of the central crop: for a square crop, more than all of it unless one
side is 14 times the other. What lies beyond never shows, and could be as much as a million times what does."""


def center(image: Tensor, image_size: tuple[int, int]) -> Tensor:
    """The middle of an image of any size, resized: uint8 (C, any, any) -> uint8 (C, H, W)."""
    height, width = image_size
    if image.shape[1:] != (height, width):
        scale = max(height / image.shape[1], width / image.shape[2]) / CENTER_CROP
        longest = [math.ceil(LONGEST * side / scale) for side in image_size]  # in pixels of the file
        image = vision.center_crop(image, [min(sides) for sides in zip(image.shape[1:], longest, strict=True)])
        image = vision.resize(image, [math.ceil(side * scale) for side in image.shape[1:]])
        image = vision.center_crop(image, [height, width])
    return image


def normalize(images: Tensor, pixels: PixelFormat | None = None) -> Tensor:
    """uint8 (B, C, H, W) -> float32 of mean 0 and standard deviation 1; by default those of ImageNet."""
    mean, std = _statistics(pixels or PixelFormat(), images.device)
    return vision.to_dtype(images, torch.float32, scale=True).sub_(mean).div_(std)


@cache
def _statistics(pixels: PixelFormat, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the channels, (C, 1, 1) each; kept, because the copy is waited for."""
    mean, std = torch.tensor([pixels.mean, pixels.std], dtype=torch.float32, device=device)[..., None, None]
    return mean, std


def denormalize(images: Tensor, pixels: PixelFormat | None = None) -> Tensor:
    """The bytes that normalized images were made of: floats (B, C, H, W) -> uint8."""
    mean, std = _statistics(pixels or PixelFormat(), images.device)
    return ((images.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def prepared(images: Tensor, image_size: tuple[int, int], dtype: torch.dtype, pixels: PixelFormat | None = None) -> Tensor:
    """Images as an encoder takes them: (B, C, H, W), normalized if they are uint8.

    Raises:
        ValueError: Images of another size or kind.
    """
    pixels, (height, width) = pixels or PixelFormat(), image_size
    if images.ndim != 4 or tuple(images.shape[1:]) != (pixels.channels, height, width):
        raise ValueError(
            f"Images of shape {tuple(images.shape)}: this model takes (B, {pixels.channels}, {height}, {width}). "
            "model.transform makes that of an image of any size."
        )
    if images.dtype == torch.uint8:
        return normalize(images, pixels).to(dtype)
    if not images.is_floating_point():
        raise ValueError(f"Images of {images.dtype}: give uint8, or floats that are normalized as model.transform does.")
    return images


class ImageTransform:
    """What validation makes of an image: its middle, resized and normalized.

    >>> from PIL import Image
    >>> ImageTransform((32, 48))(Image.new("RGB", (100, 80))).shape
    torch.Size([3, 32, 48])

    Args:
        image_size: Height H and width W in pixels.
        pixels: Channels, range of values and normalization; three channels and ImageNet's by default.
    """

    def __init__(self, image_size: tuple[int, int], pixels: PixelFormat | None = None) -> None:
        self.image_size, self.pixels = image_size, pixels or PixelFormat()

    def __call__(self, image: Image.Image | Tensor | Source | Path) -> Tensor:
        """The path of a file, a PIL image of any mode, or a uint8 tensor (C, any, any), to a float tensor (C, H, W).

        Files are read as in training: a PIL image whose orientation is not applied yet is turned, too, but has lost what
        Pillow does not read, such as colors of more than 8 bits.

        Raises:
            ValueError: Something else, or another number of channels.
            Exception: The file cannot be read: see `datamodules.decoding.read_image`.
        """
        if isinstance(image, str | bytes | Path | io.BytesIO):
            image = read_image(str(image) if isinstance(image, Path) else image, self.pixels)
        elif isinstance(image, Image.Image):
            image = upright_pixels_of(image, self.pixels)
        channels = self.pixels.channels
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != channels:
            given = f"a tensor {tuple(image.shape)} of {image.dtype}" if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"{given}: give a path, a PIL image, or a uint8 tensor ({channels}, H, W).")
        return normalize(center(image, self.image_size)[None], self.pixels)[0]
