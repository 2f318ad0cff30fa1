"""What is in the file of an image: its pixels, the right way up.

Shapes: C channels, H W pixels.
"""

import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from datamodules.bands import Bands, bands_of
from datamodules.pixel_format import PixelFormat

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""What a file may hold, whatever the ending of its name: those that are read by ending, and those that are often given
their names. Pillow would try all it knows, among them EPS, for which it starts another program."""

TURNS: dict[int, Callable[[Tensor], Tensor]] = {
    2: lambda pixels: pixels.flip(1),
    3: lambda pixels: pixels.flip(0, 1),
    4: lambda pixels: pixels.flip(0),
    5: lambda pixels: pixels.transpose(0, 1),
    6: lambda pixels: pixels.transpose(0, 1).flip(1),
    7: lambda pixels: pixels.transpose(0, 1).flip(0, 1),
    8: lambda pixels: pixels.transpose(0, 1).flip(0),
}
"""EXIF's orientation -> what puts pixels (H, W, C) the right way up; 1, or anything else, is upright."""


GRAY = np.array([0.299, 0.587, 0.114])
"""How bright red, green and blue are, as Pillow has it (ITU-R 601-2)."""


class ChannelsError(ValueError):
    """An image has another number of channels than it is to be read with."""


Source = str | bytes | io.BytesIO
"""The path of a file, as text or, in whichever encoding, as bytes; or its content."""


def read_image(path: Source, pixels: PixelFormat | None = None) -> Tensor:
    """An image, the right way up: uint8 (C, H, W), in RGB by default.

    * Transparent pixels show a white background, as in most viewers, not the color that is hidden in them.
    * Integers of more than 8 bits and floats are scaled by the range of the format: see `PixelFormat.to_bytes`.
    * Of an animation the first frame is read. The pages of a TIFF, each of one band, are its channels, as are the bands of
      one page; of RGB with opacity three are read where three channels are asked for.
    * An orientation that cannot be read counts as upright, as do damaged metadata altogether.
    * Nothing that Pillow merely warns of is an error, nor said. An image of more than twice `PIL.Image.MAX_IMAGE_PIXELS`
      (179 million pixels, half a gigabyte) is an error, as Pillow has it; a smaller one is read.

    Args:
        path: Path of the file, as text or, in whichever encoding, as bytes; or its content.
        pixels: Number of channels, and values of black and white; RGB by default.

    Raises:
        Exception: The file cannot be decoded. Libraries raise nearly every kind for damaged files: OSError, SyntaxError,
            ValueError, struct.error, TypeError, MemoryError, PIL.Image.DecompressionBombError and others.
        ChannelsError: The image has another number of channels.
    """
    pixels = pixels or PixelFormat()
    with warnings.catch_warnings(action="ignore"), _opened(path, pixels.channels) as (image, bands):
        if bands is not None:
            orientation = _orientation(image) if bands.orientation is None else bands.orientation
            return _upright(_pixels_of_bands(bands, pixels), orientation)
        assert image is not None
        plain = image.format == "JPEG" and image.mode == "RGB" and pixels.channels == 3
        decoded = _decode_plain_jpeg(path) if plain else None
        return upright_pixels_of(image, pixels) if decoded is None else _upright(decoded, _orientation(image))


def upright_pixels_of(image: Image.Image, pixels: PixelFormat) -> Tensor:
    """An image that Pillow has opened, of any mode, the right way up: uint8 (C, H, W).

    Raises:
        ChannelsError: The image has another number of channels.
        ValueError: It has no pixels.
    """
    return _upright(_pixels_of(image, pixels), _orientation(image))


def _upright(found: np.ndarray, orientation: int) -> Tensor:
    """Pixels (H, W, C), turned: (C, H, W)."""
    if not found.size:
        raise ValueError(f"it has {found.shape[0]} x {found.shape[1]} pixels")
    turned = torch.from_numpy(found)
    if orientation in TURNS:
        turned = TURNS[orientation](turned).contiguous()
    return turned.permute(2, 0, 1)


def read_values(path: Source, channels: int) -> np.ndarray:
    """The values of an image as they lie in the file, neither scaled nor turned, see `_values_of`.

    Raises:
        Exception: As for `read_image`.
    """
    with warnings.catch_warnings(action="ignore"), _opened(path, channels) as (image, bands):
        if bands is not None:
            return _values_of_bands(bands, channels)[0]
        assert image is not None
        return _values_of(image, channels)


def layout_of(path: Source) -> str:
    """What kind of image a file holds, by its header alone, such as "RGB", "I;16", "5 pages of F", or "3 bands of I;16".

    Raises:
        Exception: As for `read_image`.
    """
    with warnings.catch_warnings(action="ignore"), _opened(path) as (image, bands):
        if bands is not None:
            return f"{bands.count} bands of {bands.kind}"
        assert image is not None
        pages = len(_pages(image))
        return image.mode if pages == 1 else f"{pages} pages of {image.mode}"


def size_of(path: Source) -> tuple[int, int]:
    """Height and width of an image in pixels, by its header alone, as it lies in the file.

    Raises:
        Exception: As for `read_image`.
    """
    with warnings.catch_warnings(action="ignore"), _opened(path) as opened:
        image = opened[0] or opened[1]
        assert image is not None
        return image.height, image.width


def is_wide(layout: str) -> bool:
    """Whether a layout has values of more than 8 bits, of which no number is known to be white."""
    return layout.rsplit(" ", 1)[-1].startswith(("I", "F"))


@contextmanager
def _opened(path: Source, channels: int = 3) -> Iterator[tuple[Image.Image | None, Bands | None]]:
    """What Pillow opens of a file, None if it cannot, and its bands where Pillow cannot read them as they are."""
    source = path if isinstance(path, io.BytesIO) else os.fsdecode(path)
    try:
        image = Image.open(source, formats=FORMATS)
    except UnidentifiedImageError:
        bands = bands_of(source, None, channels)
        if bands is None:
            raise
        yield None, bands
        return
    with image:
        yield image, bands_of(source, image, channels)


def _decode_plain_jpeg(path: Source) -> np.ndarray | None:
    """Nearly all images of nearly all data sets, a fifth faster than by Pillow: the same decoder, fewer copies."""
    content = path.getvalue() if isinstance(path, io.BytesIO) else Path(os.fsdecode(path)).read_bytes()
    try:
        return simplejpeg.decode_jpeg(content, "RGB")  # (H, W, 3)
    except ValueError:
        return None  # Pillow reads some that break the rules, and says what is wrong with the others


def _pixels_of(image: Image.Image, pixels: PixelFormat) -> np.ndarray:
    """Pixels of an opened image of any mode, as they lie in the file: uint8 (H, W, C).

    Raises:
        ChannelsError: The image has another number of channels.
    """
    values = _values_of(image, pixels.channels)
    found = pixels.to_bytes(values)
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16") and isinstance(transparent, int):
        found[values == transparent] = 255
    return np.repeat(found, pixels.channels // found.shape[2], axis=2)


def _pixels_of_bands(bands: Bands, pixels: PixelFormat) -> np.ndarray:
    """As `_pixels_of`."""
    values, opacity = _values_of_bands(bands, pixels.channels)
    found = pixels.to_bytes(values)
    if opacity is not None:  # on white
        seen = found if bands.premultiplied else found * opacity
        found = np.rint(seen + 255 * (1 - opacity)).clip(0, 255).astype(np.uint8)
    return np.repeat(found, pixels.channels // found.shape[2], axis=2)


def _values_of_bands(bands: Bands, channels: int) -> tuple[np.ndarray, np.ndarray | None]:
    """As `_values_of`, and how opaque they are, (H, W, 1) in [0, 1]; None where all bands are channels, or none says so.

    Raises:
        ChannelsError: The image has another number of channels.
    """
    plain = bands.colors == 1 or (bands.rgb and bands.colors == 3)
    if channels not in ({1, 3, bands.count} if plain else {bands.colors, bands.count}):
        raise ChannelsError(f"it has {bands.count} bands, and data.channels={channels}: set that to {bands.count}")
    values, opacity = bands.values(), None
    if bands.opacity is not None and channels != bands.count:
        alone = np.nan_to_num(values[:, :, bands.opacity, None].astype(np.float64))
        opaque = max(1, 2 ** int(alone.max()).bit_length() - 1)  # 65535, or 4095 in files of 12 bits; of floats 1
        opacity = (alone / opaque).clip(0, 1)
        values = np.delete(values, bands.opacity, axis=2)
    if channels == 1 and bands.rgb and values.shape[2] == 3:
        gray = values @ GRAY
        values = (gray if values.dtype.kind == "f" else np.rint(gray)).astype(values.dtype)[:, :, None]
    return values, opacity


def _values_of(image: Image.Image, channels: int) -> np.ndarray:
    """Values of an opened image of any mode, (H, W, C): uint8 where it has 8 bits, else as they are.

    Gray of more than 8 bits is (H, W, 1) where 3 channels are asked for: all three are the same.

    Raises:
        ChannelsError: The image has another number of channels.
    """
    pages = len(_pages(image))
    if pages > 1:
        if pages != channels:
            raise ChannelsError(
                f"it has {pages} pages of one band, which are channels, and data.channels={channels}: set that to {pages}, "
                "or save the pages as files of their own"
            )
        found = []
        for page in _pages(image):
            image.seek(page)
            found.append(np.array(image.convert("L") if image.mode == "1" else image))
        return np.stack(found, axis=2)
    image.load()
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)[:, :, None]
        if channels not in (1, 3):
            raise ChannelsError(f"it has one band, and data.channels={channels}")
        return values
    if channels not in (1, 3):
        if image.mode == "P" or len(image.getbands()) != channels:
            raise ChannelsError(f"it is in {image.mode}, and data.channels={channels}")
        return np.array(image).reshape(image.height, image.width, channels)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    # A copy: what Pillow hands out may not be written to.
    return np.array(image.convert("RGB" if channels == 3 else "L")).reshape(image.height, image.width, channels)


def _pages(image: Image.Image) -> list[int]:
    """Pages of a TIFF of one band that are as large and as deep as the first, which thumbnails are not; else the first."""
    if image.format != "TIFF" or len(image.getbands()) > 1 or image.mode == "P" or getattr(image, "n_frames", 1) == 1:
        return [0]
    first, alike = (image.size, image.mode), []
    for page in range(image.n_frames):  # type: ignore[attr-defined]
        image.seek(page)
        if (image.size, image.mode) == first:
            alike.append(page)
    image.seek(0)
    return alike


def _orientation(image: Any) -> int:
    """EXIF's orientation, 1 where it has none or is damaged. Of a TIFF it is 1, because Pillow turns that by itself.

    Only read: to rewrite a damaged EXIF block, as `ImageOps.exif_transpose` does, may raise nearly anything.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) else 1
