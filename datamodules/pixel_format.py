"""Which values of a file are black and white, how many channels an image has, and how they are normalized.

Shapes: B batch, C channels, H W pixels.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Range = tuple[float, float]


@dataclass(frozen=True)
class PixelFormat:
    """How the numbers in a file become what an encoder takes: 8 bits a channel, then mean 0 and standard deviation 1.

    It is found when a folder is read for the first time and kept in the checkpoint, so that whoever uses the model sees
    images as it saw them.

    >>> PixelFormat(channels=1).mean
    (0.5,)

    Args:
        channels: Number of channels C: 1 gray, 3 red, green and blue, or any other number of bands.
        integers: Values of integers of more than 8 bits that are black and white.
        floats: Values of floating-point numbers that are black and white.
        mean: Mean of each channel, of values in [0, 1]; of 3 channels that of ImageNet by default, else 0.5.
        std: Standard deviation of each channel; of 3 channels that of ImageNet by default, else 0.25.

    Raises:
        ValueError: No channels, an empty range, or a mean or standard deviation for another number of channels.
    """

    channels: int = 3
    integers: Range = (0, 65535)
    floats: Range = (0.0, 1.0)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"channels={self.channels}: give 1 for gray, 3 for color, or the number of bands.")
        for low, high in (self.integers, self.floats):
            if not low < high:
                raise ValueError(f"value_range=({low}, {high}): give the values of black and white, the smaller one first.")
        rgb = self.channels == 3
        object.__setattr__(self, "mean", self.mean or (IMAGENET_MEAN if rgb else (0.5,) * self.channels))
        object.__setattr__(self, "std", self.std or (IMAGENET_STD if rgb else (0.25,) * self.channels))
        if not len(self.mean) == len(self.std) == self.channels or min(self.std) <= 0:
            raise ValueError(
                f"mean={self.mean}, std={self.std}: give a number for each of {self.channels} channels, and std > 0."
            )

    def to_bytes(self, values: np.ndarray) -> np.ndarray:
        """Values of any type, of the same shape in uint8: below black is black, above white is white, NaN is black.

        Integers of 12 bits with the range (0, 4095) keep their upper 8 bits; floats are rounded.
        """
        if values.dtype == np.uint8:
            return values
        if np.issubdtype(values.dtype, np.floating):
            low, high = self.floats
            scaled = np.rint((values.astype(np.float64) - low) * (255 / (high - low)))
            scaled = np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0)
        else:
            low, high = self.integers
            scaled = np.floor((values.astype(np.float64) - low) * (256 / (high - low + 1)))
        return scaled.clip(0, 255).astype(np.uint8)

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint, which is read without running any code in it."""
        return asdict(self)

    @staticmethod
    def from_dict(content: dict[str, Any]) -> "PixelFormat":
        """The inverse of `to_dict`; lists are as good as tuples."""
        known: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
        return PixelFormat(**known)

    def with_range(self, value_range: Range | None) -> "PixelFormat":
        """The same with other values of black and white, unless they are None."""
        return self if value_range is None else replace(self, integers=value_range, floats=value_range)


def agree(known: PixelFormat | None, channels: int, data: Any) -> PixelFormat | None:
    """Have a data module read images as a model was trained to see them, or else the model learns it from the data.

    A range that the user gives, `data.value_range`, is not overruled.

    Args:
        known: Format of the model's checkpoint; None for a new model.
        channels: Number of channels that the model was built for.
        data: Data module, or None.

    Returns:
        The format of the model from now on; None if nobody knows.

    Raises:
        ValueError: The data has another number of channels.
    """
    theirs: PixelFormat | None = getattr(data, "pixels", None)
    if theirs is None:
        return known
    if theirs.channels != channels:
        raise ValueError(
            f"The model has channels={channels} but data.channels={theirs.channels}: set both to the number of channels of "
            "the images, 1 for gray and 3 for color."
        )
    if known is None:
        return theirs
    data.pixels = known.with_range(getattr(data, "value_range", None))
    return known
