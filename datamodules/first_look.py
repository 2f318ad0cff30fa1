"""A look at some of the images of a folder before training: how they are stored, and how their values are to be scaled.

Shapes: C channels, H W pixels.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from datamodules.decoding import ChannelsError, is_wide, layout_of, read_values, size_of
from datamodules.image_files import printable
from datamodules.pixel_format import PixelFormat, Range

Normalization = Literal["imagenet", "found"]

LOOKED_AT = 1000
"""How many images of a folder are looked at, evenly spaced."""

POINTS = 64
"""How many rows and columns of an image the mean and standard deviation are taken from."""

LAYOUTS = {
    "RGB": "8-bit RGB",
    "L": "8-bit gray",
    "1": "1-bit",
    "P": "palette",
    "RGBA": "RGB with transparency",
    "LA": "gray with transparency",
    "I": "32-bit integers",
    "F": "floats",
}
"""Pillow's names of layouts -> what messages call them; 16-bit gray has four names, the others are called by theirs."""


MOST = 0.001
"""Fraction of the floats at either end that may lie far away from all others without widening the range."""

FAR = 10
"""How many times as far as the others all floats reach, where some lie far away."""

SIZES = range(32, 129, 32)
"""Sizes in pixels that are chosen from where none is given: with 8 x 8 patches, of 4 to 16 pixels."""


class Look(NamedTuple):
    """What a look at some images has found."""

    pixels: PixelFormat
    said: str
    """A sentence on how they are stored and scaled, and on those of other channels; "" if all are as usual."""


def look(
    paths: Sequence[bytes],
    channels: int = 3,
    value_range: Range | None = None,
    normalization: Normalization | None = None,
    fetch: Callable[[bytes], Any] | None = None,
) -> Look:
    """Find the values of black and white of images with more than 8 bits, and the mean and standard deviation.

    Integers of more than 8 bits are taken to use as many bits as the largest of them needs: 12 bits in files of 16 make
    4095 white. Floats in [0, 1] have that range, others that from the smallest to the largest, but for values far from all
    others: one in a thousand, or one and the same number such as -9999 for no data. Only such images are decoded, and all
    that are looked at where mean and standard deviation are to be found. Damaged files are passed over here, since whoever
    reads them next names them.

    Args:
        paths: Files of the images.
        channels: Number of channels C that they are read with.
        value_range: Values of black and white, if they are known.
        normalization: "imagenet" takes ImageNet's mean and standard deviation, "found" those of the images; by default
            ImageNet's for 3 channels.
        fetch: Gets the content of an image by its path, where that is no file.

    Raises:
        ValueError: An argument out of its range, or not one image has so many channels.
    """
    check_normalization(channels, normalization)
    find = (normalization or ("imagenet" if channels == 3 else "found")) == "found"
    layouts, misfits, points, floats = Counter[str](), [], [], []
    ranges: dict[str, Range] = {}
    for path in _evenly(paths):
        try:
            layout = layout_of(path if fetch is None else fetch(path))
            if find or is_wide(layout) or " of " in layout:
                values = read_values(path if fetch is None else fetch(path), channels)
                _widen(ranges, values)
                points.append(_thinned(values))
                floats += [points[-1].ravel()] if values.dtype.kind == "f" else []
            layouts[layout] += 1
        except ChannelsError as error:
            misfits.append(f"{printable(path)}: {error}")
        except Exception:  # as in `ImageDataset.decode`: damage raises nearly anything
            continue
    if misfits and not layouts:
        raise ValueError(f"Not one of {len(misfits)} images looked at has data.channels={channels}. {misfits[0]}.")
    pixels = PixelFormat(channels).with_range(value_range)
    if value_range is None and "integers" in ranges:
        pixels = replace(pixels, integers=_used_bits(*ranges["integers"]))
    if value_range is None and "floats" in ranges:
        pixels = replace(pixels, floats=_float_range(*ranges["floats"], np.concatenate(floats)))
    if find and points:
        sums = np.zeros((2, channels))
        for part in points:
            scaled = np.broadcast_to(pixels.to_bytes(part), (len(part), channels)) / 255
            sums += np.stack([scaled.sum(axis=0), np.square(scaled).sum(axis=0)])
        mean, squares = sums / sum(len(part) for part in points)
        std = np.sqrt((squares - np.square(mean)).clip(0)).clip(1 / 255)  # a channel that is constant has none
        pixels = replace(pixels, mean=_rounded(mean), std=_rounded(std))
    said = _say(layouts, pixels, ranges, find)
    if misfits:
        said = f"{said} {len(misfits)} have other channels and will be left out: {misfits[0]}.".strip()
    return Look(pixels, said)


def found_size(paths: Sequence[bytes], fetch: Callable[[bytes], Any] | None = None) -> tuple[int, int]:
    """The size to resize images to where none is given: the largest of `SIZES` that half of them have on both sides.

    Args:
        paths: Files of the images, some of which are looked at, by their headers alone.
        fetch: As for `look`.

    Raises:
        ValueError: Not one of them can be read.
    """
    shorter = []
    for path in _evenly(paths):
        try:
            shorter.append(min(size_of(path if fetch is None else fetch(path))))
        except Exception:  # as in `look`
            continue
    if not shorter:
        raise ValueError(f"Not one of {len(paths)} images can be read, so that data.image_size cannot be found: give it.")
    half = np.quantile(shorter, 0.5, method="higher")
    fitting = [size for size in SIZES if size <= half]
    size = fitting[-1] if fitting else SIZES[0]
    return size, size


def _evenly(paths: Sequence[bytes]) -> list[bytes]:
    """Those of the paths that are looked at, evenly spaced."""
    places = np.unique(np.linspace(0, len(paths) - 1, min(LOOKED_AT, len(paths))).round().astype(int))
    return [paths[place] for place in places]


def check_normalization(channels: int, normalization: str | None) -> None:
    """Raise a ValueError for an unknown normalization, or ImageNet's for other than three channels."""
    if normalization is not None and normalization not in get_args(Normalization):
        raise ValueError(f"data.normalization={normalization!r}: choose one of {', '.join(get_args(Normalization))}.")
    if normalization == "imagenet" and channels != 3:
        raise ValueError(f"data.normalization='imagenet' is of 3 channels, and data.channels={channels}: choose 'found'.")


def _widen(ranges: dict[str, Range], values: np.ndarray) -> None:
    """Take the values of an image into the ranges of their kind; those of 8 bits have none."""
    if values.dtype == np.uint8:
        return
    kind = "floats" if np.issubdtype(values.dtype, np.floating) else "integers"
    finite = values[np.isfinite(values)]
    if finite.size:
        low, high = ranges.get(kind, (np.inf, -np.inf))
        ranges[kind] = min(low, float(finite.min())), max(high, float(finite.max()))


def _thinned(values: np.ndarray) -> np.ndarray:
    """Some of the pixels of an image, evenly spaced: (H, W, C) -> (at most POINTS^2, C)."""
    rows, columns = (-(-side // POINTS) for side in values.shape[:2])
    thin = values[::rows, ::columns]
    return thin.reshape(-1, thin.shape[2]).copy()  # not a view of the whole


def _used_bits(low: float, high: float) -> Range:
    """From 0 to the largest number of as many bits as are in use, or as found where there are negative numbers."""
    if low < 0:
        return low, max(high, low + 1)
    return 0, 2 ** max(8, int(high).bit_length()) - 1


def _float_range(low: float, high: float, some: np.ndarray) -> Range:
    """Black and white of floats from `low` to `high`: of most of them, where a few lie far away.

    Args:
        low: The smallest of all values.
        high: The largest of all values.
        some: Evenly spaced ones of them, (N,), of any value.
    """
    some = some[np.isfinite(some)]
    between = some[(some > low) & (some < high)]  # without a number that stands for no data
    if len(between) > len(some) / 2:
        inner = [float(value) for value in np.quantile(between, (MOST, 1 - MOST))]
        if high - low > FAR * (inner[1] - inner[0]):
            low, high = inner
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    return low, high if high > low else low + 1


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(value), 4) for value in values)


def _say(layouts: Counter[str], pixels: PixelFormat, ranges: dict[str, Range], find: bool) -> str:
    """What is said of the images, if there is anything unusual about them."""
    if not find and set(layouts) <= {"RGB"}:
        return ""
    named = Counter[str]()
    for layout, count in layouts.items():
        parts, _, mode = layout.rpartition(" of ")
        name = "16-bit gray" if mode.startswith("I;16") else LAYOUTS.get(mode, mode)
        if parts.endswith("bands"):
            name = f"with {parts} of {name.replace('-bit gray', ' bits')}"
        named[f"{name} in {parts}" if parts.endswith("pages") else name] += count
    kinds = ", ".join(f"{count} {name}" for name, count in named.most_common())
    said = [f"Of {layouts.total()} images looked at: {kinds}"]
    if "integers" in ranges:
        low, high = pixels.integers or ranges["integers"]
        said.append(f"integers of more than 8 bits from {low:g} (black) to {high:g} (white)")
    if "floats" in ranges:
        (low, high), (lowest, highest) = pixels.floats or ranges["floats"], ranges["floats"]
        beyond = f", cutting off those down to {lowest:g} and up to {highest:g} (data.value_range says otherwise)"
        said.append(f"floats from {low:g} to {high:g}" + (beyond if lowest < low or highest > high else ""))
    if find:
        mean, std = (", ".join(f"{value:.3f}" for value in of) for of in (pixels.mean, pixels.std))
        said.append(f"mean {mean}, standard deviation {std}")
    return "; ".join(said) + "."
