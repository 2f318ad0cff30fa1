"""What is read from the file of an image, and that damage to it ends nothing."""

import io
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_script, write_images
from PIL import EpsImagePlugin, ExifTags, Image, ImageOps
from torchvision.transforms.v2 import functional as vision

from datamodules import Views
from datamodules.decoding import read_image
from datamodules.image_datasets import HeldOutImages, ImageDataset, TrainingImages, TrainingViews
from datamodules.image_files import EXTENSIONS, Samples, scan
from datamodules.preprocessing import CENTER_CROP, ImageTransform, center
from datamodules.views import ViewMaker

ORIENTATION = (0x0112, 3, 1, b"\6\0\0\0")  # to be turned to the right


def drawing(height: int = 12, width: int = 20) -> Image.Image:
    pixels = torch.randint(0, 256, (3, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return vision.to_pil_image(vision.resize(pixels, [height, width]))


def samples(*paths: Path) -> Samples:
    return Samples(np.array([str(path).encode() for path in paths]), torch.zeros(len(paths), dtype=torch.int64))


def exif(*tags: tuple[int, int, int, bytes]) -> bytes:
    """A block of (tag, type, count, value), in whichever combination."""
    entries = b"".join(struct.pack("<HHI", *tag[:3]) + tag[3] for tag in sorted(tags))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "lzw.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_the_right_way_up(tmp_path: Path, ending: str, orientation: int) -> None:
    path, tags = tmp_path / f"turned.{ending}", Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    way = {"webp": {"lossless": True}, "lzw.tif": {"compression": "tiff_lzw"}}.get(ending, {})
    drawing().save(path, exif=tags, **way)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    found = read_image(str(path))
    assert found.shape == ((3, 12, 20) if orientation < 5 else (3, 20, 12))
    assert np.array_equal(found.permute(1, 2, 0), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_model_turns_what_it_is_given_as_in_training(tmp_path: Path, orientation: int) -> None:
    path, tags = tmp_path / "turned.jpg", Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    drawing().save(path, exif=tags)
    transform = ImageTransform((12, 12))
    expected = transform(read_image(str(path)))
    for source in (path, str(path), str(path).encode(), io.BytesIO(path.read_bytes())):
        assert torch.equal(transform(source), expected)
    with Image.open(path) as image:
        assert (transform(image) - expected).abs().max() < 0.1  # another decoder of JPEG
        assert torch.equal(transform(ImageOps.exif_transpose(image)), transform(image))


@pytest.mark.parametrize("ending", EXTENSIONS)
def test_every_ending_that_is_found_is_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    kind = {".jfif": "JPEG", ".jpe": "JPEG", ".pnm": "PPM", ".pbm": "PPM", ".pgm": "PPM"}.get(ending)
    mode = {".pbm": "1", ".pgm": "L", ".gif": "L"}.get(ending, "RGB")
    image = drawing().convert(mode)
    image.save(path, kind, **({"irreversible": False} if ending == ".jp2" else {"quality": 95}))
    found = read_image(str(path))
    difference = (found.permute(1, 2, 0).int() - torch.tensor(np.array(image.convert("RGB"))).int()).abs()
    assert found.shape == (3, 12, 20) and difference.float().mean() < 12, "JPEG and its kin are not exact"
    assert samples(path).paths[0] in scan(tmp_path).samples.paths


@pytest.mark.parametrize(
    "odd",
    [
        (0x011A, 2, 4, b"abc\0"),  # a resolution that is a word: TypeError when the block is written anew
        (0x0100, 2, 4, b"abc\0"),  # so is the width: struct.error
        (0xA005, 11, 1, b"aaaa"),  # a directory at a fraction of a byte: struct.error
    ],
)
def test_a_turned_image_with_an_odd_tag_is_read(tmp_path: Path, odd: tuple[int, int, int, bytes]) -> None:
    drawing().save(tmp_path / "odd.jpg", exif=exif(ORIENTATION, odd))
    assert ImageDataset(samples(tmp_path / "odd.jpg"), (8, 8), 0).decode(0).shape == (3, 20, 12)


@pytest.mark.parametrize(
    "block",
    [
        exif((0x0112, 2, 4, b"abc\0")),  # a word
        exif((0x0112, 5, 1, b"\0\0\0\0")),  # a fraction elsewhere
        exif((0x0112, 3, 1, b"\x63\0\0\0")),  # 99
        exif(ORIENTATION)[:17],  # cut off
        b"Exif\0\0" + b"\xff" * 40,
    ],
)
def test_an_orientation_that_cannot_be_read_is_upright(tmp_path: Path, block: bytes) -> None:
    drawing().save(tmp_path / "odd.jpg", exif=block, dpi=(72, 72))  # or else Pillow looks for those there
    assert read_image(str(tmp_path / "odd.jpg")).shape == (3, 12, 20)


@pytest.mark.parametrize("error", [MemoryError(), AttributeError("no such thing"), struct.error("short"), RecursionError()])
def test_no_exception_of_a_file_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", fail)
    images = ImageDataset(samples(tmp_path / "a.jpg", tmp_path / "b.jpg"), (8, 8), 0)
    with pytest.warns(
        UserWarning, match=rf"b.jpg cannot be decoded and is left out \({type(error).__name__}:.* 1 of 2 so far"
    ):
        assert images.decode(1) is None
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("a bad file is tried again"))
    assert images.decode(1) is None


def test_ctrl_c_is_no_bad_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image, "open", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ImageDataset(samples(tmp_path / "a.jpg"), (8, 8), 0).decode(0)


def test_what_pillow_warns_of_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "big.png"
    drawing(20, 20).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # 400 pixels: a warning, and warnings are errors here
    assert read_image(str(path)).shape == (3, 20, 20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Image.DecompressionBombError):
        read_image(str(path))


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bits_are_scaled(tmp_path: Path, ending: str) -> None:
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    for order in "<>":  # TIFF knows both
        Image.fromarray(values.astype(f"{order}u2") if ending == "tif" else values).save(tmp_path / f"deep.{ending}")
        found = read_image(str(tmp_path / f"deep.{ending}"))
        assert np.array_equal(found[0], values >> 8) and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("ending", ["jpg", "JPEG", "png", "webp", "gif", "bmp", "tif", "tiff"])
def test_every_ending_is_read(tmp_path: Path, ending: str) -> None:
    Image.new("RGB", (8, 9), (200, 10, 60)).save(tmp_path / f"a.{ending}")
    found = read_image(str(tmp_path / f"a.{ending}"))
    assert found.shape == (3, 9, 8) and (found[:, 4, 4] - torch.tensor([200, 10, 60])).abs().max() <= 3


def test_transparent_pixels_show_white(tmp_path: Path) -> None:
    """The left half is opaque red, the right half transparent green."""
    plain = Image.new("RGBA", (8, 4), (255, 0, 0, 255))
    plain.paste((0, 255, 0, 0), (4, 0, 8, 4))
    half = plain.copy()
    half.paste((0, 0, 0, 128), (4, 0, 8, 4))
    plain.save(tmp_path / "color.png")
    plain.save(tmp_path / "color.webp", lossless=True)
    plain.save(tmp_path / "color.tif")
    palette = Image.new("P", (8, 4), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.paste(1, (4, 0, 8, 4))
    palette.save(tmp_path / "index.png", transparency=1)
    palette.save(tmp_path / "index.gif", transparency=1)
    palette.save(tmp_path / "table.png", transparency=bytes([255, 0]))
    plain.convert("RGB").save(tmp_path / "key.png", transparency=(0, 255, 0))
    for path in sorted(tmp_path.iterdir()):
        found = read_image(str(path))
        assert found[:, 1, 1].tolist() == [255, 0, 0] and found[:, 1, 6].tolist() == [255, 255, 255], path.name
    half.save(tmp_path / "half.png")
    assert read_image(str(tmp_path / "half.png"))[:, 1, 6].tolist() == [127, 127, 127]
    Image.merge("LA", [Image.new("L", (8, 4), 30), plain.getchannel("A")]).save(tmp_path / "gray.png")
    assert read_image(str(tmp_path / "gray.png"))[0, 1].tolist() == [30] * 4 + [255] * 4
    deep = Image.fromarray(np.array([[256, 512]], dtype=np.uint16))
    deep.save(tmp_path / "deep.png", transparency=512)
    assert read_image(str(tmp_path / "deep.png"))[0].tolist() == [[1, 255]]


def test_an_image_without_pixels_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *_, **__: Image.new("RGB", (0, 4)))
    with pytest.warns(UserWarning, match=r"a.png cannot be decoded .*it has 4 x 0 pixels"):
        assert ImageDataset(samples(tmp_path / "a.png"), (8, 8), 0).decode(0) is None


def test_what_starts_another_program_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", False)  # even if it were looked for, none would be started
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(OSError, match="cannot identify"):
        read_image(str(tmp_path / "a.jpg"))


def old_center(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The whole image is resized, then cut."""
    scale = max(size[0] / image.shape[1], size[1] / image.shape[2]) / CENTER_CROP
    image = vision.resize(image, [int(np.ceil(side * scale)) for side in image.shape[1:]])
    return vision.center_crop(image, list(size))


@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (97, 31), (31, 97), (600, 50), (64, 64), (20, 20)])
@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
def test_the_middle_is_cut_as_from_the_whole(tmp_path: Path, shape: tuple[int, int], size: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (3, *shape), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(center(image, size), old_center(image, size))


@pytest.mark.parametrize("shape", [(1000, 10), (10, 1000), (1999, 3), (3, 1999)])
def test_the_middle_of_a_long_image_is_where_it_was(tmp_path: Path, shape: tuple[int, int]) -> None:
    ramp = torch.linspace(0, 255, max(shape)).view([-1 if side == max(shape) else 1 for side in shape])
    image = ramp.expand(3, *shape).to(torch.uint8)
    found = center(image, (32, 32))
    assert (found.int() - old_center(image, (32, 32)).int()).abs().max() <= 1


MEMORY = """
import re, sys
from pathlib import Path
import torch
from test_decoding import Image, HeldOutImages, TrainingImages, TrainingViews, ViewMaker, Views, samples

def megabytes():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

out, size = Path(sys.argv[1]), (224, 224)
files = [out / f"{number}.png" for number in range(4)]
for file, (width, height) in zip(files, [(256, 256), (10000, 1), (1, 10000), (1, 65535)]):
    Image.new("RGB", (width, height)).save(file)
torch.set_num_threads(1)
maker = ViewMaker(Views(geometric=True), size, (0.3, 1.0), 0.5)
sets = [(HeldOutImages(samples(*files), size, 0), lambda n: n),
        (TrainingImages(samples(*files), size, 0, (0.3, 1.0), 0.5), lambda n: (0, n)),
        (TrainingViews(samples(*files), size, 0, maker), lambda n: (0, n))]
for images, name in sets:
    images.__getitems__([name(0)])
before = megabytes()
for images, name in sets:
    for number in (1, 2, 3):
        images.__getitems__([name(number)])
assert megabytes() - before < 100, f"{before} to {megabytes()} MB"
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory as Linux tells it")
def test_no_shape_of_an_image_takes_much_memory(tmp_path: Path) -> None:
    run_script(MEMORY, tmp_path / "memory")


def test_the_next_image_stands_in_for_a_bad_one_whoever_found_it(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    (tmp_path / "0001.jpg").write_bytes(b"no image")
    files = samples(*(tmp_path / f"000{number}.jpg" for number in range(3)))
    first = TrainingImages(files, (8, 8), 0, (0.3, 1.0), 0.0)
    with warnings.catch_warnings(record=True, action="always") as said:
        found = first.__getitems__([(0, 1)]).images
    assert len(said) == 1
    later = TrainingImages(files, (8, 8), 0, (0.3, 1.0), 0.0, unreadable=first.unreadable)
    assert torch.equal(later.__getitems__([(0, 1)]).images, found), "and says nothing: warnings are errors here"


def test_views_share_what_is_known_of_bad_files(tmp_path: Path) -> None:
    write_images(tmp_path, 2)
    files = samples(tmp_path / "none.jpg", tmp_path / "0001.jpg")
    held_out = HeldOutImages(files, (8, 8), 0)
    with pytest.warns(UserWarning, match="none.jpg"):
        assert held_out.__getitems__([0]) is None
    maker = ViewMaker(Views(), (8, 8), (0.3, 1.0), 0.5)
    assert len(TrainingViews(files, (8, 8), 0, maker, unreadable=held_out.unreadable).__getitems__([(0, 0)]).sources) == 1
