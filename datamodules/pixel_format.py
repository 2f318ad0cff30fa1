"""Which values of a file are black and white, how many channels an image has, and how they are normalized.

Shapes: B batch, C channels, H W pixels.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

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
        integers: Values of integers of more than 8 bits that are black and white; None where there were no such images, and
            then 0 and 65535.
        floats: Values of floating-point numbers that are black and white; None where there were none, and then 0 and 1.
        mean: Mean of each channel, of values in [0, 1]; of 3 channels that of ImageNet by default, else 0.5.
        std: Standard deviation of each channel; of 3 channels that of ImageNet by default, else 0.25.

    Raises:
        ValueError: No channels, an empty range, or a mean or standard deviation for another number of channels.
    """

    channels: int = 3
    integers: Range | None = None
    floats: Range | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"channels={self.channels}: give 1 for gray, 3 for color, or the number of bands.")
        rgb = self.channels == 3
        object.__setattr__(self, "mean", tuple(self.mean) or (IMAGENET_MEAN if rgb else (0.5,) * self.channels))
        object.__setattr__(self, "std", tuple(self.std) or (IMAGENET_STD if rgb else (0.25,) * self.channels))
        for name in ("integers", "floats"):
            found = getattr(self, name)
            if found is not None and (len(found) != 2 or not found[0] < found[1]):
                raise ValueError(f"value_range={found}: give the values of black and white, the smaller one first.")
            object.__setattr__(self, name, None if found is None else tuple(found))  # what can be a key
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
            low, high = self.floats or (0.0, 1.0)
            scaled = np.rint((values.astype(np.float64) - low) * (255 / (high - low)))
            scaled = np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0)
        else:
            low, high = self.integers or (0, 65535)
            scaled = np.floor((values.astype(np.float64) - low) * (256 / (high - low + 1)))
        return scaled.clip(0, 255).astype(np.uint8)

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint, which is read without running any code in it."""
        return asdict(self)

    @staticmethod
    def from_dict(content: dict[str, Any]) -> "PixelFormat":
        """The inverse of `to_dict`; lists are as good as tuples."""
        return PixelFormat(**content)

    def with_range(self, value_range: Range | None) -> "PixelFormat":
        """The same with other values of black and white, unless they are None."""
        return self if value_range is None else replace(self, integers=value_range, floats=value_range)


def agree(known: PixelFormat | None, channels: int, data: Any) -> PixelFormat | None:
    """Have a data module read images as a model was trained to see them, or else the model learns it from the data.

    Of values that the model never saw, such as integers of more than 8 bits, the range is that of the data. A range that the
    user gives, `data.value_range`, is not overruled, and is the model's from then on.

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
    merged = replace(known, integers=known.integers or theirs.integers, floats=known.floats or theirs.floats)
    merged = merged.with_range(getattr(data, "value_range", None))
    for name in ("integers", "floats"):
        ours, alone = getattr(merged, name), getattr(theirs, name)
        if alone is not None and ours != alone:
            rank_zero_info(
                f"{name.capitalize()} from {ours[0]:g} (black) to {ours[1]:g} (white), as the model was trained; of these "
                f"images alone it would be {alone[0]:g} to {alone[1]:g}. data.value_range sets it."
            )
    data.pixels = merged
    return merged
