"""Random changes of training images: turns, crops, flips and distortions, or pairs of views; from torch's global generator.

Shapes: C channels, H W pixels.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import v2

from datamodules.views import Pair, ViewMaker


class Turns:
    """Random turns of a whole image, (C, H, W), for images that have no upper side; from torch's global generator.

    Args:
        vertical_flip: Probability of a vertical flip.
        rotate: Whether to turn by a random multiple of 90 degrees.
    """

    def __init__(self, vertical_flip: float, rotate: bool) -> None:
        self.vertical_flip, self.rotate = vertical_flip, rotate

    def __call__(self, image: Tensor) -> Tensor:
        if torch.rand(()).item() < self.vertical_flip:
            image = image.flip(1)
        if self.rotate:
            image = image.rot90(int(torch.randint(4, ())), (1, 2))
        return image


def random_change(
    size: tuple[int, int],
    crop_scale: tuple[float, float],
    flip: float,
    rand_augment: bool = False,
    turns: Turns | None = None,
) -> Callable[[Tensor], Tensor]:
    """The random change of a training image, (C, any, any) -> (C, H, W), uint8: turns, a crop, a flip, and distortions.

    Of tensors: torch resizes its uint8 images several times faster than Pillow does its own.
    """
    steps = [v2.RandomResizedCrop(size, scale=crop_scale), v2.RandomHorizontalFlip(flip)]
    steps += [v2.RandAugment()] if rand_augment else []
    return v2.Compose(steps if turns is None else [turns, *steps])


def random_pair(maker: ViewMaker, turns: Turns | None = None) -> Callable[[Tensor], Pair]:
    """The random pair of views of a training image, (C, any, any), and turns of the whole image before."""
    return maker.pair if turns is None else v2.Compose([turns, maker.pair])
