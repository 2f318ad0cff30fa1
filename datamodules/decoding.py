"""What is in the file of an image: its pixels in RGB, the right way up.

Shapes: H W pixels.
"""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image
from torch import Tensor

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
"""EXIF's orientation -> what puts pixels (H, W, 3) the right way up; 1, or anything else, is upright."""


def read_image(path: str | bytes) -> Tensor:
    """An image in RGB, the right way up: uint8 (3, H, W).

    * Transparent pixels show a white background, as in most viewers, not the color that is hidden in them.
    * Of 16 bits the upper eight are taken, so that white stays white. (A camera's 12 bits in a file of 16 stay dark: the
      file does not say how many are in use.)
    * Of an animation the first frame is read.
    * An orientation that cannot be read counts as upright, as do damaged metadata altogether.
    * Nothing that Pillow merely warns of is an error, nor said. An image of more than twice `PIL.Image.MAX_IMAGE_PIXELS`
      (179 million pixels, half a gigabyte) is an error, as Pillow has it; a smaller one is read.

    Args:
        path: Path of the file, as text or, in whichever encoding, as bytes.

    Raises:
        Exception: The file cannot be decoded. Libraries raise nearly every kind for damaged files: OSError, SyntaxError,
            ValueError, struct.error, TypeError, MemoryError, PIL.Image.DecompressionBombError and others.
        ValueError: The values are 32-bit integers or floats, of which no number is known to be white.
    """
    name = os.fsdecode(path)
    with warnings.catch_warnings(action="ignore"), Image.open(name, formats=FORMATS) as image:
        pixels = _decode_plain_jpeg(name) if image.format == "JPEG" and image.mode == "RGB" else None
        if pixels is None:
            pixels = _to_rgb(image)
        orientation = _orientation(image)
    if not pixels.size:
        raise ValueError(f"it has {pixels.shape[0]} x {pixels.shape[1]} pixels")
    turned = torch.from_numpy(pixels)  # (H, W, 3)
    if orientation in TURNS:
        turned = TURNS[orientation](turned).contiguous()
    return turned.permute(2, 0, 1)


def _decode_plain_jpeg(name: str) -> np.ndarray | None:
    """Nearly all images of nearly all data sets, a fifth faster than by Pillow: the same decoder, fewer copies."""
    try:
        return simplejpeg.decode_jpeg(Path(name).read_bytes(), "RGB")  # (H, W, 3)
    except ValueError:
        return None  # Pillow reads some that break the rules, and says what is wrong with the others


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Pixels of an image of any mode, as they lie in the file: uint8 (H, W, 3)."""
    image.load()
    if image.mode in ("I", "F"):
        raise ValueError(f"its values are {'32-bit integers' if image.mode == 'I' else 'floats'}: save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits, not scale them
        values = np.asarray(image)
        gray = (values >> 8).astype(np.uint8)
        gray[values == image.info.get("transparency", -1)] = 255
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))  # a copy: what Pillow hands out may not be written to


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 where it has none or is damaged. Of a TIFF it is 1, because Pillow turns that by itself.

    Only read: to rewrite a damaged EXIF block, as `ImageOps.exif_transpose` does, may raise nearly anything.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) else 1
