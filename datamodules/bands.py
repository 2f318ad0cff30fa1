"""Images of several bands that Pillow would cut to 8 bits, or would not open: PNG of 16 bits, TIFF of any number of bands.

Shapes: H W pixels, C bands.
"""

import io
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image
from PIL.ExifTags import Base
from tifffile import EXTRASAMPLE, PHOTOMETRIC

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # damage is said by whoever reads the images

TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How TIFFs begin; the last two are those of more than 4 GB."""

PNG_BANDS = {"LA;16B": 2, "RGB;16B": 3, "RGBA;16B": 4}
"""Pillow's name of what a PNG of 16 bits holds -> its number of bands."""

READ = (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB)
"""What a TIFF says of how its values become colors; whatever else it says is not read here."""


@dataclass(frozen=True)
class Bands:
    """An image of several bands whose values are not read yet."""

    source: str | io.BytesIO
    """Path of the file, or its content."""

    height: int
    width: int
    count: int
    """Number of bands C."""

    kind: str
    """Pillow's name of what a band holds: "L" for bytes, "I;16", "I" for other integers, "F" for floats."""

    rgb: bool
    """Whether the first three bands are red, green and blue."""

    opacity: int | None
    """The band that says how opaque the others are, if there is one."""

    premultiplied: bool
    """Whether the others are multiplied by it already."""

    orientation: int | None
    """EXIF's, 1 being upright; None for a PNG, of which Pillow knows."""

    @property
    def colors(self) -> int:
        """Number of bands without that of the opacity."""
        return self.count - (self.opacity is not None)

    def values(self) -> np.ndarray:
        """(H, W, C), as they lie in the file.

        Raises:
            Exception: As for `datamodules.decoding.read_image`.
        """
        if self.height * self.width > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
            raise Image.DecompressionBombError(f"it has {self.height} x {self.width} pixels")
        if self.orientation is None:
            content = self.source.getvalue() if isinstance(self.source, io.BytesIO) else Path(self.source).read_bytes()
            return imagecodecs.png_decode(content)
        with tifffile.TiffFile(_rewound(self.source)) as file:
            planes = file.pages[0].asarray(squeeze=False)[:, 0]  # (C, H, W, 1) or (1, H, W, C)
        values = planes.transpose(1, 2, 0, 3).reshape(self.height, self.width, self.count)
        return values.astype(values.dtype.newbyteorder("="), copy=False)


def bands_of(source: str | io.BytesIO, image: Image.Image | None, channels: int) -> Bands | None:
    """The bands of a file that Pillow does not read as they are; None for all others.

    Args:
        source: Path of the file, or its content.
        image: As Pillow has opened it; None if it could not.
        channels: Number of channels that are asked for: of bytes, Pillow reads 1 and 3.

    Raises:
        Exception: As for `datamodules.decoding.read_image`.
    """
    if image is not None and image.format == "PNG":
        tiles: Any = getattr(image, "tile", None)
        count = PNG_BANDS.get(tiles[0].args if tiles else "")
        if count is None:
            return None
        if count == 3 and "transparency" in image.info:  # a color that is clear: decoded as a fourth band
            count = 4
        opacity = {2: 1, 4: 3}.get(count)
        return Bands(source, image.height, image.width, count, "I;16", count > 2, opacity, False, None)
    if image is not None:
        tags = getattr(image, "tag_v2", {})
        count = tags.get(Base.SamplesPerPixel, 1)
        if image.format != "TIFF" or count == 1 or image.mode in ("CMYK", "LAB", "YCbCr"):
            return None
        left_out = count - len(image.getbands())  # such as a fourth band of unknown meaning next to RGB
        if max(tags.get(Base.BitsPerSample, (8,))) <= 8 and (left_out == 0 or (channels in (1, 3) and left_out == 1)):
            return None
    elif not _is_tiff(source):
        return None
    with tifffile.TiffFile(_rewound(source)) as tiff:
        page: Any = tiff.pages[0]
        if page.samplesperpixel == 1 or page.dtype is None or page.photometric not in READ:
            return None
        extra = list(page.extrasamples)
        opacity = next(
            (place for place, kind in enumerate(extra) if kind in (EXTRASAMPLE.ASSOCALPHA, EXTRASAMPLE.UNASSALPHA)), None
        )
        return Bands(
            source,
            page.imagelength,
            page.imagewidth,
            page.samplesperpixel,
            {"u1": "L", "u2": "I;16"}.get(page.dtype.str[1:], "F" if page.dtype.kind == "f" else "I"),
            page.photometric == PHOTOMETRIC.RGB,
            None if opacity is None else page.samplesperpixel - len(extra) + opacity,
            opacity is not None and extra[opacity] == EXTRASAMPLE.ASSOCALPHA,
            _orientation_of(page),
        )


def _orientation_of(page: Any) -> int:
    """Of a page of a TIFF; upright where it is damaged."""
    tag = page.tags.get(Base.Orientation)
    return tag.value if tag is not None and isinstance(tag.value, int) else 1


def _is_tiff(source: str | io.BytesIO) -> bool:
    if isinstance(source, io.BytesIO):
        return source.getvalue().startswith(TIFF)
    with open(source, "rb") as file:
        return file.read(4).startswith(TIFF)


def _rewound(source: str | io.BytesIO) -> str | io.BytesIO:
    """The same, from its start on: whoever tried before may have read some of it."""
    if isinstance(source, io.BytesIO):
        source.seek(0)
    return source
