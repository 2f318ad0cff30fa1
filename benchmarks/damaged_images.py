"""Damaged files of images, read as in a run: none may end it.

    python benchmarks/damaged_images.py [--files 100000] [--seed 0]

Small images of every format and mode that is read, at least half of them with an orientation in their EXIF block, are
damaged at random: bytes changed, cut off, left out, put in or repeated, anywhere or within the EXIF block, the latter also
before a checksum is made of it. Each is written to a file, since that is what is read in a run. Prints how many files were
read or left out, by format and by class of the exception (libtiff writes lines of its own); exits with 1 if an exception
left the reader or what it gave was no image.
"""

import argparse
import io
import os
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image

from datamodules.image_datasets import ImageDataset, UnreadableImageWarning
from datamodules.image_files import Samples

FORMATS: dict[str, tuple[tuple[str, ...], tuple[dict[str, object], ...]]] = {
    "jpg": (("RGB", "L", "CMYK"), ({"quality": 75}, {"quality": 95, "progressive": True, "subsampling": 0})),
    "png": (("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), ({}, {"compress_level": 0})),
    "webp": (("RGB", "RGBA"), ({"quality": 60}, {"lossless": True})),
    "gif": (("P", "L", "RGB"), ({}, {"interlace": 0}, {"transparency": 0})),
    "bmp": (("RGB", "L", "P", "1"), ({},)),
    "tif": (
        ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I", "F"),
        ({}, {"compression": "tiff_lzw"}, {"compression": "tiff_deflate"}, {"compression": "packbits"}),
    ),
}
"""Ending -> modes, and ways to save."""

WITH_EXIF = ("jpg", "png", "webp", "tif")


def damaged(ending: str, random: np.random.Generator) -> tuple[bytes, bool]:
    """A damaged file of an image of 8 to 40 pixels a side, and whether it had an orientation."""
    modes, ways = FORMATS[ending]
    mode, way = modes[random.integers(len(modes))], ways[random.integers(len(ways))]
    height, width = random.integers(8, 41, size=2)
    if mode == "I;16":
        image = Image.fromarray(random.integers(0, 65536, (height, width), dtype=np.uint16))
    else:
        pixels = random.integers(0, 256, (2, 2, 4 if mode[-1] == "A" else 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((int(width), int(height))).convert(mode)
    tagged, degraded = ending in WITH_EXIF and random.random() < 0.9, False
    if tagged:
        block = exif_block(random, nested=ending != "tif")  # libtiff does not write those
        degraded = ending != "tif" and random.random() < 0.5  # nor a damaged block
        way = way | {"exif": damage(block, random) if degraded else block}
    file = io.BytesIO()
    image.save(file, "JPEG" if ending == "jpg" else "TIFF" if ending == "tif" else ending, **way)
    content = file.getvalue()
    return content if degraded and random.random() < 0.5 else damage(content, random), tagged


def exif_block(random: np.random.Generator, nested: bool) -> bytes:
    """An orientation among other tags, some of them odd or in directories of their own."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = int(random.integers(1, 9))
    exif[ExifTags.Base.Make] = "camera"
    exif[ExifTags.Base.XResolution] = 72.0
    if random.random() < 0.5:
        exif[ExifTags.Base.UserComment] = bytes(random.integers(0, 256, 12, dtype=np.uint8))
    if nested and random.random() < 0.3:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] = 0.01
    if nested and random.random() < 0.3:
        exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    return exif.tobytes()


def damage(content: bytes, random: np.random.Generator) -> bytes:
    """A file with one to three kinds of damage; half of the time within its EXIF block, where it has one."""
    block = content.find(b"Exif\0\0")
    if block < 0:
        block = content.find(b"camera") - 60  # PNG, WebP and TIFF keep the bare block
    for _ in range(random.integers(1, 4)):
        if not content:
            break
        inside = block >= 0 and random.random() < 0.5
        first, last = (block, min(block + 200, len(content))) if inside else (0, len(content))
        start = int(random.integers(first, max(first + 1, last)))
        content = DAMAGES[random.integers(len(DAMAGES))](content, start, random)
    return content


def change(content: bytes, start: int, random: np.random.Generator) -> bytes:
    """One to four bytes are others."""
    new = bytes(random.integers(0, 256, random.integers(1, 5), dtype=np.uint8))
    return content[:start] + new + content[start + len(new) :]


def flip_bit(content: bytes, start: int, random: np.random.Generator) -> bytes:
    """One bit is another."""
    if start >= len(content):
        return content
    return content[:start] + bytes([content[start] ^ (1 << int(random.integers(8)))]) + content[start + 1 :]


def extreme(content: bytes, start: int, random: np.random.Generator) -> bytes:
    """A number of two or four bytes is the largest, the smallest, or none."""
    value = [0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF][random.integers(7)]
    order = "<>"[random.integers(2)]
    new = struct.pack(order + "H", value) if value <= 0xFFFF and random.random() < 0.5 else struct.pack(order + "I", value)
    return content[:start] + new + content[start + len(new) :]


def retype(content: bytes, start: int, random: np.random.Generator) -> bytes:
    """The orientation's tag, if it is found, has another type, count or value."""
    for tag, order in ((b"\x12\x01\x03\x00", "<"), (b"\x01\x12\x00\x03", ">")):
        place = content.find(tag)
        if place >= 0:
            count = int(random.choice([0, 1, 2, 5, 0xFFFF]))
            new = struct.pack(order + "HIHH", *(int(random.integers(0, 14)), count, *random.integers(0, 12, 2).tolist()))
            return content[: place + 2] + new + content[place + 12 :]
    return content


def cut(content: bytes, start: int, _: np.random.Generator) -> bytes:
    """The rest is missing."""
    return content[:start]


def drop(content: bytes, start: int, random: np.random.Generator) -> bytes:
    """Some bytes are missing."""
    return content[:start] + content[start + int(random.integers(1, 33)) :]


def put_in(content: bytes, start: int, random: np.random.Generator) -> bytes:
    """Some bytes are too many."""
    return content[:start] + bytes(random.integers(0, 256, random.integers(1, 33), dtype=np.uint8)) + content[start:]


def blank(content: bytes, start: int, random: np.random.Generator) -> bytes:
    """A stretch is zero, as where a disk was not written."""
    length = int(random.integers(1, 65))
    return content[:start] + bytes(min(length, max(0, len(content) - start))) + content[start + length :]


def repeat(content: bytes, start: int, random: np.random.Generator) -> bytes:
    """A stretch comes twice."""
    end = start + int(random.integers(1, 65))
    return content[:end] + content[start:]


Damage = Callable[[bytes, int, np.random.Generator], bytes]
DAMAGES: tuple[Damage, ...] = (change, flip_bit, extreme, retype, retype, cut, drop, put_in, blank, repeat)


def main(num_files: int, seed: int) -> int:
    """Print the table; the number of files that the reader did not survive."""
    random = np.random.default_rng(seed)
    endings = list(FORMATS)
    share = np.array([0.35, 0.2, 0.15, 0.06, 0.04, 0.2])  # of the formats
    outcomes: dict[str, Counter[str]] = {ending: Counter() for ending in endings}
    tagged, start = 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        places = [path.with_suffix(f".{ending}") for ending in endings]
        drawn = random.choice(len(endings), num_files, p=share)
        names = np.array([os.fsencode(place) for place in places])[drawn]
        images = ImageDataset(Samples(names, torch.zeros(num_files, dtype=torch.int64)), (16, 16), seed)
        for number, kind in enumerate(drawn):
            ending = endings[kind]
            content, has_orientation = damaged(ending, random)
            places[kind].write_bytes(content)
            tagged += has_orientation
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    image = images.decode(number)
                except Exception:
                    traceback.print_exc()
                    outcomes[ending]["LEFT THE READER"] += 1
                    continue
            if image is not None:
                whole = image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3 and image.numel()
                outcomes[ending]["read" if whole and not said else "NO IMAGE"] += 1
            elif len(said) == 1 and said[0].category is UnreadableImageWarning:
                outcomes[ending][str(said[0].message).rsplit(" is left out (", 1)[-1].split(":")[0]] += 1
            else:
                outcomes[ending]["NOT NAMED"] += 1
    total = sum(outcomes.values(), Counter[str]())
    print(f"{num_files} damaged files, {tagged} of them with an orientation, in {time.perf_counter() - start:.0f} s")
    print(f"| | {' | '.join(endings)} | all |\n| :-- | {' | '.join(['--:'] * (len(endings) + 1))} |")
    for name, count in total.most_common():
        print(f"| {name} | {' | '.join(str(outcomes[ending][name]) for ending in endings)} | {count} |")
    failed = sum(total[name] for name in ("LEFT THE READER", "NO IMAGE", "NOT NAMED"))
    print(f"{failed} exceptions left the reader or were not named.")
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.exit(main(arguments.files, arguments.seed) > 0)
