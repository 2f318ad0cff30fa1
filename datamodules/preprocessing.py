"""From the pixels of a file to what encoders take: the middle of an image, normalized."""

import math
from functools import cache

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

CENTER_CROP = 0.875
"""Side of the central crop that held-out images are cut to, as a fraction of the resized image: 224 of 256."""

LONGEST = 16
"""How much of a long image is resized, in sides of the central crop: for a square crop, more than all of it unless one
side is 14 times the other. What lies beyond never shows, and could be as much as a million times what does."""


def center(image: Tensor, image_size: tuple[int, int]) -> Tensor:
    """The middle of an image of any size, resized: uint8 (3, any, any) -> uint8 (3, H, W)."""
    height, width = image_size
    if image.shape[1:] != (height, width):
        scale = max(height / image.shape[1], width / image.shape[2]) / CENTER_CROP
        longest = [math.ceil(LONGEST * side / scale) for side in image_size]  # in pixels of the file
        image = vision.center_crop(image, [min(sides) for sides in zip(image.shape[1:], longest, strict=True)])
        image = vision.resize(image, [math.ceil(side * scale) for side in image.shape[1:]])
        image = vision.center_crop(image, [height, width])
    return image


def normalize(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 of ImageNet's mean 0 and standard deviation 1."""
    mean, std = imagenet_statistics(images.device)
    return vision.to_dtype(images, torch.float32, scale=True).sub_(mean).div_(std)


@cache
def imagenet_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of ImageNet's channels, (3, 1, 1) each; kept, because the copy is waited for."""
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], dtype=torch.float32, device=device)[..., None, None]
    return mean, std


def denormalize(images: Tensor) -> Tensor:
    """The bytes that normalized images were made of: floats (B, 3, H, W) -> uint8."""
    mean, std = (images.new_tensor(values, dtype=torch.float32)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((images.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def prepared(images: Tensor, image_size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Images as an encoder takes them: (B, 3, H, W), normalized if they are uint8.

    Raises:
        ValueError: Images of another size or kind.
    """
    height, width = image_size
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, height, width):
        raise ValueError(
            f"Images of shape {tuple(images.shape)}: this model takes (B, 3, {height}, {width}). model.transform makes that "
            "of an image of any size."
        )
    if images.dtype == torch.uint8:
        return normalize(images).to(dtype)
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
    """

    def __init__(self, image_size: tuple[int, int]) -> None:
        self.image_size = image_size

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """A PIL image of any mode, or a uint8 tensor (3, any, any), to a float tensor (3, H, W).

        Raises:
            ValueError: Something else.
        """
        if isinstance(image, Image.Image):
            image = vision.pil_to_tensor(image.convert("RGB"))
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            given = f"a tensor {tuple(image.shape)} of {image.dtype}" if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"{given}: give a PIL image, or a uint8 tensor (3, H, W).")
        return normalize(center(image, self.image_size)[None])[0]
