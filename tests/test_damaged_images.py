"""Whatever happens to the bytes of an image's file, it is either read or left out with one warning."""

import io
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from datamodules.image_datasets import HeldOutImages, UnreadableImageWarning
from datamodules.image_files import Samples

FORMATS = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P", "L"),
    "BMP": ("RGB", "L", "P", "1"),
    "TIFF": ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I", "F"),
}

places = st.floats(0, 1, exclude_max=True)
damages = st.one_of(
    st.tuples(st.just("change"), places, st.binary(min_size=1, max_size=4)),
    st.tuples(st.just("insert"), places, st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("drop"), places, st.integers(1, 40)),
    st.tuples(st.just("cut"), places, st.none()),
)


def damage(content: bytes, kind: str, place: float, how: bytes | int | None) -> bytes:
    start = int(place * len(content))
    if kind == "cut":
        return content[:start]
    if kind == "drop":
        return content[:start] + content[start + how :]
    return content[:start] + how + content[start + (len(how) if kind == "change" else 0) :]


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    tags[ExifTags.Base.Make], tags[ExifTags.Base.XResolution] = "camera", 72.0
    return tags.tobytes()


@pytest.mark.parametrize("image_format", FORMATS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(data=st.data(), orientation=st.integers(1, 8), sides=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_a_damaged_file_is_read_or_left_out(
    image_format: str, data: st.DataObject, orientation: int, sides: tuple[int, int]
) -> None:
    mode = data.draw(st.sampled_from(FORMATS[image_format]), "mode")
    block, content = exif(orientation), io.BytesIO()
    if image_format in ("JPEG", "PNG", "WEBP"):  # where the checksums fit the damage
        for one in data.draw(st.lists(damages, max_size=2), "damage to the EXIF block"):
            block = damage(block, *one)
    tagged = {} if image_format in ("GIF", "BMP") else {"exif": block}
    Image.new(mode, sides, 1).save(content, image_format, **tagged)
    broken = content.getvalue()
    for one in data.draw(st.lists(damages, max_size=3), "damage to the file"):
        broken = damage(broken, *one)
    check(broken)


def check(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.jpg"
        path.write_bytes(content)
        images = HeldOutImages(Samples(np.array([str(path).encode()]), torch.zeros(1, dtype=torch.int64)), (8, 8), 0)
        with warnings.catch_warnings(record=True, action="always") as said:
            batch = images.__getitems__([0])
    if batch is None:
        assert [warning.category for warning in said] == [UnreadableImageWarning]
    else:
        assert batch.images.shape == (1, 3, 8, 8) and batch.images.dtype == torch.uint8 and not said


@given(content=st.binary(max_size=200))
@settings(max_examples=100, deadline=None, database=None)
@example(b"")
@example(b"\xff\xd8\xff")
@example(b"GIF89a\0\0\0\0\0\0\0;")
def test_bytes_that_are_no_image_are_left_out(content: bytes) -> None:
    check(content)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_survives_every_cut(image_format: str, orientation: int) -> None:
    content = io.BytesIO()
    Image.new("RGB", (3, 5)).save(content, image_format, exif=exif(orientation))
    whole = content.getvalue()
    for end in range(0, len(whole), 7):
        check(whole[:end])
