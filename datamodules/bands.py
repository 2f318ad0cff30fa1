"""Images of several bands that Pillow would cut to 8 bits, or would not open: PNG of 16 bits, TIFF of any number of bands.

Shapes: H W pixels, C bands.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from PIL import ExifTags, Image
from torchvision.io import ImageReadMode, decode_png

TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How TIFFs begin; the last two are those of more than 4 GB."""


@dataclass(frozen=True)
class Bands:
    """An image of several bands whose values are not read yet."""

    source: str | io.BytesIO
    """Path of the file, or its content."""

    format: str
    """ "PNG" or "TIFF"."""

    height: int
    width: int
    count: int
    """Number of bands C."""

    kind: str
    """Pillow's name of what a band holds: "L" for bytes, "I;16", "I" for other integers, "F" for floats."""

    orientation: int
    """EXIF's; 1 is upright."""

    opacity: bool
    """Whether the last band says how opaque the others are."""

    def values(self) -> np.ndarray:
        """(H, W, C), as they lie in the file.

        Raises:
            Exception: As for `datamodules.decoding.read_image`; ValueError names the package that a compression needs.
        """
        if self.height * self.width > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
            raise Image.DecompressionBombError(f"it has {self.height} x {self.width} pixels")
        if self.format == "PNG":
            content = self.source.getvalue() if isinstance(self.source, io.BytesIO) else Path(self.source).read_bytes()
            decoded = decode_png(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.UNCHANGED)
            return decoded.permute(1, 2, 0).numpy()
        with tifffile.TiffFile(_rewound(self.source)) as file:
            planes = file.pages[0].asarray(squeeze=False)[:, 0]  # (C, H, W, 1) or (1, H, W, C)
        values = planes.transpose(1, 2, 0, 3).reshape(self.height, self.width, self.count)
        return values.astype(values.dtype.newbyteorder("="), copy=False)


def bands_of(source: str | io.BytesIO, image: Image.Image | None) -> Bands | None:
    """The bands of a file that Pillow does not read as they are; None for all others.

    Args:
        source: Path of the file, or its content.
        image: As Pillow has opened it; None if it could not.

    Raises:
        Exception: As for `datamodules.decoding.read_image`.
    """
    if image is not None and image.format == "PNG":
        tiles: Any = getattr(image, "tile", None)
        raw = tiles[0].args if tiles else ""
        if raw not in ("LA;16B", "RGB;16B", "RGBA;16B"):
            return None
        count = {"LA": 2, "RGB": 3, "RGBA": 4}[str(raw).partition(";")[0]]
        turned = image.getexif().get(ExifTags.Base.Orientation, 1)
        return Bands(source, "PNG", image.height, image.width, count, "I;16", turned, opacity=count != 3)
    if image is not None:
        tags = getattr(image, "tag_v2", {})
        count, deepest = tags.get(277, 1), max(tags.get(258, (8,)))
        whole = image.mode in ("CMYK", "LAB", "YCbCr") or (deepest <= 8 and len(image.getbands()) == count)
        if image.format != "TIFF" or count == 1 or whole:
            return None
    elif not _is_tiff(source):
        return None
    with tifffile.TiffFile(_rewound(source)) as tiff:
        page: Any = tiff.pages[0]
        if page.samplesperpixel == 1 or page.dtype is None:
            return None
        tag = page.tags.get(274)
        extra = page.extrasamples or (0,)
        return Bands(
            source,
            "TIFF",
            page.imagelength,
            page.imagewidth,
            page.samplesperpixel,
            {"u1": "L", "u2": "I;16"}.get(page.dtype.str[1:], "F" if page.dtype.kind == "f" else "I"),
            1 if tag is None else int(tag.value),
            opacity=int(extra[-1]) in (1, 2),
        )


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
