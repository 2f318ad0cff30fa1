"""Images as microscopes and cameras write them: which values are black and white, how many channels, and what is refused."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from conftest import small_ijepa, small_images, small_views, trainer, write_images
from PIL import Image
from torch import Tensor

from datamodules import ImageFolder, MultiTask
from datamodules.decoding import layout_of, read_image, size_of
from datamodules.first_look import look
from datamodules.pixel_format import IMAGENET_MEAN, PixelFormat, agree
from datamodules.preprocessing import denormalize, normalize
from datamodules.random_changes import Turns
from jepa_lightning import load
from jepa_lightning.figures import to_colors
from jepa_lightning.probes import CompletionProbe, KNNProbe, LinearProbe
from jepa_lightning.weights.checkpoints import load_probe
from jepa_lightning.weights.exporting import export_weights
from jepa_lightning.weights.importing import load_encoder
from jepa_lightning.weights.loading import start_from

RAMP = np.arange(0, 4096, 64, dtype=np.uint16).reshape(8, 8)
"""All of the 64 brightest steps of 12 bits, from 0 to 4032."""


def save(folder: Path, name: str, values: np.ndarray, **how: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(folder / name, **how)
    return folder / name


def save_pages(folder: Path, name: str, pages: np.ndarray) -> Path:
    """A TIFF with a page for each channel: (C, H, W)."""
    images = [Image.fromarray(page) for page in pages]
    folder.mkdir(parents=True, exist_ok=True)
    images[0].save(folder / name, save_all=True, append_images=images[1:])
    return folder / name


def paths(folder: Path) -> list[bytes]:
    return sorted(str(path).encode() for path in folder.rglob("*") if path.is_file())


def microscopy(folder: Path, channels: int = 2, count: int = 12) -> Path:
    """12-bit images of so many pages."""
    generator = np.random.default_rng(0)
    for number in range(count):
        pages = generator.integers(0, 4096, (channels, 20, 24), dtype=np.uint16)
        pages[0] //= 4
        save_pages(folder, f"{number:02d}.tif", pages)
    return folder


@pytest.mark.parametrize(
    ("values", "pixels", "expected"),
    [
        (np.array([0, 15, 16, 4095, 65535], np.uint16), PixelFormat(integers=(0, 4095)), [0, 0, 1, 255, 255]),
        (np.array([0, 255, 256, 65535], np.uint16), PixelFormat(), [0, 0, 1, 255]),
        (np.array([99, 100, 227, 228, 355, 356], np.int32), PixelFormat(integers=(100, 355)), [0, 0, 127, 128, 255, 255]),
        (np.array([-1, 0, 0.5, 1, 2, np.nan, np.inf, -np.inf], np.float32), PixelFormat(), [0, 0, 128, 255, 255, 0, 255, 0]),
        (np.array([-2, 0, 2], np.float64), PixelFormat(floats=(-2, 2)), [0, 128, 255]),
        (np.array([0, 7, 255], np.uint8), PixelFormat(integers=(0, 4095)), [0, 7, 255]),
        (np.array([0, 4095], ">u2"), PixelFormat(integers=(0, 4095)), [0, 255]),
    ],
)
def test_values_are_scaled_by_the_range_of_their_kind(values: np.ndarray, pixels: PixelFormat, expected: list[int]) -> None:
    found = pixels.to_bytes(values)
    assert found.dtype == np.uint8 and found.tolist() == expected


def test_one_folder_of_many_kinds(tmp_path: Path) -> None:
    """12 bits, gray, floats, a palette and CMYK: each in its own range, in color and in gray."""
    save(tmp_path, "twelve.tif", RAMP)
    save(tmp_path, "gray.png", (RAMP // 16).astype(np.uint8))
    save(tmp_path, "float.tif", (RAMP / 4096).astype(np.float32))
    save(tmp_path, "bits.png", RAMP > 2000)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "palette.bmp")
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "cmyk.tif")
    found = look(paths(tmp_path))
    assert found.pixels == PixelFormat(integers=(0, 4095), floats=(0, 1))
    assert "integers of more than 8 bits from 0 (black) to 4095 (white); floats from 0 to 1" in found.said
    assert all(f"1 {kind}" in found.said for kind in ("16-bit gray", "8-bit gray", "floats", "palette", "1-bit", "CMYK"))
    expected = {
        "twelve.tif": RAMP // 16,
        "gray.png": RAMP // 16,
        "float.tif": np.rint(RAMP / 4096 * 255),
        "bits.png": (RAMP > 2000) * 255,
        "palette.bmp": np.broadcast_to(np.array([10, 20, 30])[:, None, None], (3, 8, 8)),
        "cmyk.tif": np.broadcast_to(np.array([0, 255, 255])[:, None, None], (3, 8, 8)),
    }
    for name, values in expected.items():
        color = read_image(str(tmp_path / name), found.pixels)
        assert color.shape == (3, 8, 8) and np.array_equal(color, np.broadcast_to(values, (3, 8, 8))), name
        gray = read_image(str(tmp_path / name), PixelFormat(1, integers=(0, 4095)))
        assert gray.shape == (1, 8, 8), name
        if values.ndim == 2:
            assert np.array_equal(gray[0], values), name
        else:
            assert abs(int(gray[0, 0, 0]) - values[:, 0, 0] @ [0.299, 0.587, 0.114]) < 1.5, name


def test_pages_of_a_tiff_are_its_channels(tmp_path: Path) -> None:
    pages = np.stack([RAMP // 16 * part for part in range(5)]).astype(np.uint16)
    path = save_pages(tmp_path, "five.tif", pages)
    found = look([str(path).encode()], channels=5)
    assert "1 16-bit gray in 5 pages" in found.said and found.pixels.integers == (0, 1023)
    assert np.array_equal(read_image(str(path), PixelFormat(5, integers=(0, 1023))), pages // 4)
    for channels in (1, 3, 4):
        with pytest.raises(ValueError, match=rf"5 pages of one band, .* data.channels={channels}: set that to 5"):
            read_image(str(path), PixelFormat(channels))
    with pytest.raises(ValueError, match=r"Not one of 1 images looked at has data.channels=3. .*five.tif: it has 5 pages"):
        look([str(path).encode()])


def test_of_several_pages_of_colors_the_first_is_read(tmp_path: Path) -> None:
    pages = [Image.new(mode, (8, 8), color) for mode in ("RGB", "P") for color in (1, 2)]
    for name, (first, second) in (("rgb", pages[:2]), ("palette", pages[2:])):
        first.save(tmp_path / f"{name}.tif", save_all=True, append_images=[second])
        expected = np.array(first.convert("RGB"))
        assert np.array_equal(read_image(str(tmp_path / f"{name}.tif")).permute(1, 2, 0), expected)


def test_what_is_looked_at_need_not_be_a_file(tmp_path: Path) -> None:
    little, big = save(tmp_path, "a.tif", RAMP), tmp_path / "b.tif"
    tifffile.imwrite(big, RAMP, byteorder=">", photometric="minisblack")
    contents = {b"0": little.read_bytes(), b"1": big.read_bytes()}
    found = look(list(contents), fetch=lambda place: io.BytesIO(contents[place]))
    assert found.pixels.integers == (0, 4095) and "Of 2 images looked at: 2 16-bit gray;" in found.said


def test_bands_of_other_images_are_channels(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (6, 7, 4), dtype=np.uint8)
    path = save(tmp_path, "four.png", values)
    assert np.array_equal(read_image(str(path), PixelFormat(4)).permute(1, 2, 0), values)
    with pytest.raises(ValueError, match=r"it is in RGBA, and data.channels=5"):
        read_image(str(path), PixelFormat(5))
    deep = save(tmp_path, "deep.tif", RAMP)
    with pytest.raises(ValueError, match=r"it has one band, and data.channels=4"):
        read_image(str(deep), PixelFormat(4))


def png16(values: np.ndarray) -> bytes:
    """A PNG of 16 bits in gray with opacity, RGB or RGBA, (H, W, 2 to 4), which Pillow does not write."""
    height, width, count = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[count], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def bands(count: int, dtype: str = "uint16") -> np.ndarray:
    """12 bits in so many bands, (8, 9, C): the first pixel is white."""
    values = np.random.default_rng(count).integers(0, 4096, (8, 9, count), dtype=np.uint16)
    values[0, 0] = 4095
    scale = {"uint8": 1 / 16, "float32": 1 / 4096}.get(dtype, 1)
    return (values * scale).astype(dtype)


def save_bands(path: Path, values: np.ndarray, planar: str = "contig", **how: Any) -> Path:
    order = values if planar == "contig" else values.transpose(2, 0, 1)
    how = {"photometric": "rgb" if values.shape[2] in (3, 4) else "minisblack", "planarconfig": planar} | how
    tifffile.imwrite(path, order, **how)
    return path


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">u2", "uint32", "int16", "float32"])
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_bands_of_any_depth_are_channels(tmp_path: Path, count: int, dtype: str, planar: str) -> None:
    values = bands(count, dtype)
    order = {"byteorder": ">"} if dtype == ">u2" else {}
    path = save_bands(tmp_path / "a.tif", values, planar, **order, compression="zlib")
    pixels = PixelFormat(count, integers=(0, 4095))
    expected = pixels.to_bytes(values)
    for source in (str(path), str(path).encode(), io.BytesIO(path.read_bytes())):
        assert np.array_equal(read_image(source, pixels).permute(1, 2, 0), expected)
    assert size_of(str(path)) == (8, 9)
    found = look([str(path).encode()], channels=count)
    if dtype in ("uint16", ">u2", "uint32", "int16"):
        assert found.pixels.integers == (0, 4095)
    name = {"uint8": "8 bits", "uint16": "16 bits", ">u2": "16 bits", "float32": "floats"}
    if dtype != "uint8" or count == 5:
        assert f"1 with {count} bands of {name.get(dtype, '32-bit integers')}" in found.said
    if count == 5:
        with pytest.raises(ValueError, match=r"it has 5 bands, and data.channels=3: set that to 5"):
            read_image(str(path))


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_colors_of_16_bits_keep_all_of_them(tmp_path: Path, ending: str, count: int) -> None:
    """In 12 bits of 16: Pillow would keep the upper 8, nearly black."""
    values, path = bands(count), tmp_path / f"a.{ending}"
    opaque = np.array([65535, 0, 13107], np.uint16)
    if count != 3:
        values[:, :, -1] = opaque[np.arange(9) % 3]  # opaque, clear, a fifth
    if ending == "png":
        path.write_bytes(png16(values))
    else:
        save_bands(path, values, extrasamples=None if count == 3 else ["unassalpha"])
    colors = values if count == 3 else values[:, :, :-1]
    found = look([str(path).encode()])
    assert found.pixels == PixelFormat(integers=(0, 4095)), "the opacity of 16 bits is no color"
    assert f"1 with {count} bands of 16 bits" in found.said
    expected = np.repeat(colors // 16, 3 // colors.shape[2], axis=2).astype(float)
    if count != 3:
        share = (opaque / 65535)[np.arange(9) % 3][None, :, None]
        expected = np.rint(255 - (255 - expected) * share)
    for source in (str(path), io.BytesIO(path.read_bytes())):
        assert np.array_equal(read_image(source, found.pixels).permute(1, 2, 0), expected)
    gray = read_image(str(path), PixelFormat(1, integers=(0, 4095)))
    assert np.abs(gray[0].numpy() - expected @ [0.299, 0.587, 0.114]).max() < 1.5
    whole = PixelFormat(count, integers=(0, 4095))
    assert np.array_equal(read_image(str(path), whole).permute(1, 2, 0), whole.to_bytes(values)), "or all as channels"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_bands_are_the_right_way_up(tmp_path: Path, orientation: int) -> None:
    values = bands(3)
    tag = (274, "H", 1, orientation, True)
    deep = read_image(str(save_bands(tmp_path / "deep.tif", values, extratags=[tag])), PixelFormat(integers=(0, 4095)))
    plain = read_image(str(save_bands(tmp_path / "plain.tif", (values // 16).astype(np.uint8), extratags=[tag])))
    assert torch.equal(deep, plain) and deep.shape == ((3, 8, 9) if orientation < 5 else (3, 9, 8))


@pytest.mark.parametrize("compression", ["lzw", "zstd", "deflate", None])
def test_compressed_bands_are_read(tmp_path: Path, compression: str | None) -> None:
    path = save_bands(tmp_path / "a.tif", bands(3), compression=compression)
    assert np.array_equal(read_image(str(path), PixelFormat(integers=(0, 4095))).permute(1, 2, 0), bands(3) // 16)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
def test_a_white_ground_shows_through_what_is_clear(tmp_path: Path, dtype: str, kind: str) -> None:
    """Half as opaque: of black a middle gray, of white white, whether or not the color is multiplied by it already."""
    most = {"uint8": 255, "uint16": 65535, "float32": 1.0}[dtype]
    white = most * (0.5 if kind == "assocalpha" else 1)
    values = np.array([[[0, 0, 0, most * 0.5], [white, white, white, most * 0.5], [0, 0, 0, most]]]).astype(dtype)
    path = save_bands(tmp_path / "a.tif", values, extrasamples=[kind])
    assert np.abs(read_image(str(path))[:, 0].int().numpy() - np.array([127, 255, 0])).max() <= 1
    if dtype != "float32":
        return
    bytes_in_floats = save_bands(tmp_path / "b.tif", values * 255, extrasamples=[kind])
    found = read_image(str(bytes_in_floats), PixelFormat(floats=(0, 255)))
    assert np.abs(found[:, 0].int().numpy() - np.array([127, 255, 0])).max() <= 1


def test_opacity_of_12_bits(tmp_path: Path) -> None:
    values = np.array([[[0, 4095, 0, 4095], [0, 4095, 0, 0]]], np.uint16)
    (tmp_path / "a.png").write_bytes(png16(values))
    found = read_image(str(tmp_path / "a.png"), PixelFormat(integers=(0, 4095)))
    assert found[:, 0].T.tolist() == [[0, 255, 0], [255, 255, 255]]


def test_a_clear_color_of_16_bits_is_white(tmp_path: Path) -> None:
    values = np.array([[[9, 9, 9], [4095, 0, 0]]], np.uint16)
    content = png16(values)
    clear = b"tRNS" + struct.pack(">HHH", 9, 9, 9)
    chunk = struct.pack(">I", 6) + clear + struct.pack(">I", zlib.crc32(clear))
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])
    found = read_image(str(tmp_path / "a.png"), PixelFormat(integers=(0, 4095)))
    assert found[:, 0].T.tolist() == [[255, 255, 255], [255, 0, 0]]


@pytest.mark.parametrize(("count", "extra"), [(4, [0]), (5, [2, 0]), (2, [0])])
def test_bytes_with_a_band_of_unknown_meaning_are_read_without_it(tmp_path: Path, count: int, extra: list[int]) -> None:
    values = np.random.default_rng(0).integers(0, 256, (8, 9, count), dtype=np.uint8)
    if 2 in extra:
        values[:, :, 3] = 255
    path = save_bands(tmp_path / "a.tif", values, extrasamples=extra, photometric="minisblack" if count == 2 else "rgb")
    expected = values[:, :, [0, 0, 0]] if count == 2 else values[:, :, :3]
    assert np.array_equal(read_image(str(path)).permute(1, 2, 0), expected)
    assert np.array_equal(read_image(str(path), PixelFormat(count)).permute(1, 2, 0), values), "or all of them"
    assert layout_of(str(path)) in ("L", "RGB", "RGBA", "RGBX")


def test_bands_of_unknown_colors_are_no_colors(tmp_path: Path) -> None:
    three = save_bands(tmp_path / "three.tif", bands(3), photometric="minisblack")
    assert np.array_equal(read_image(str(three), PixelFormat(integers=(0, 4095))).permute(1, 2, 0), bands(3) // 16)
    with pytest.raises(ValueError, match=r"it has 3 bands, and data.channels=1"):
        read_image(str(three), PixelFormat(1))
    lab = save_bands(tmp_path / "lab.tif", bands(3), photometric="cielab")
    for path in (lab,):
        with pytest.raises(Exception, match="."):
            read_image(str(path))


def test_damaged_metadata_of_bands_are_upright(tmp_path: Path) -> None:
    content = png16(bands(3))
    block = b"eXIf" + b"no exif at all"
    chunk = struct.pack(">I", len(block) - 4) + block + struct.pack(">I", zlib.crc32(block))
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])
    save_bands(tmp_path / "b.tif", bands(3), extratags=[(274, "H", 2, (6, 6), True)])
    for name in ("a.png", "b.tif"):
        found = read_image(str(tmp_path / name), PixelFormat(integers=(0, 4095)))
        assert np.array_equal(found.permute(1, 2, 0), bands(3) // 16)


def test_damaged_deep_pngs_are_errors(tmp_path: Path) -> None:
    """Not the end of the process, as with torchvision's decoder."""
    content = png16(bands(3))
    place = content.index(b"IDAT")
    (size,) = struct.unpack(">I", content[place - 4 : place])
    short = b"IDAT" + zlib.compress(zlib.decompress(content[place + 4 : place + 4 + size])[:100])
    chunk = struct.pack(">I", len(short) - 4) + short + struct.pack(">I", zlib.crc32(short))
    damaged = {
        "crc": content[: place + 4 + size] + b"odd!" + content[place + 8 + size :],
        "short": content[: place - 4] + chunk + content[place + 8 + size :],
        "cut": content[: place + 20],
    }
    for name, damage in damaged.items():
        (tmp_path / f"{name}.png").write_bytes(damage)
        with pytest.raises(Exception, match="."):
            read_image(str(tmp_path / f"{name}.png"))


def test_damaged_bands_are_left_out(tmp_path: Path) -> None:
    whole = save_bands(tmp_path / "whole.tif", bands(5)).read_bytes()
    for number, length in enumerate((6, 20, len(whole) // 2, len(whole) - 100)):
        (tmp_path / f"{number}.tif").write_bytes(whole[:length])
    for number in range(4):
        with pytest.raises(Exception, match="."):
            read_image(str(tmp_path / f"{number}.tif"), PixelFormat(5))
    assert look(paths(tmp_path), channels=5).pixels.integers == (0, 4095)


def test_huge_bands_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_bands(tmp_path / "a.tif", bands(5))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 35)
    with pytest.raises(Image.DecompressionBombError, match="8 x 9 pixels"):
        read_image(str(path), PixelFormat(5))


def test_a_folder_of_deep_colors_trains(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(6):
        (tmp_path / "images" / f"{number}.png").write_bytes(png16(bands(3) // (number + 1)))
    data = small_images(tmp_path / "images", batch_size=2)
    fitted(data, tmp_path / "run")
    assert data.pixels.integers == (0, 4095)
    model = load(tmp_path / "run" / "a.ckpt")
    batch = next(iter(data.val_dataloader()))
    file = data._samples["val"].paths[0].decode()
    torch.testing.assert_close(model.transform(file), normalize(batch.images, data.pixels)[0])
    torch.testing.assert_close(model.transform(Path(file)), model.transform(io.BytesIO(Path(file).read_bytes())))


@pytest.mark.parametrize(
    ("largest", "white"), [(1, 255), (255, 255), (256, 511), (1023, 1023), (2048, 4095), (4095, 4095), (4096, 8191)]
)
def test_white_is_the_largest_number_of_the_bits_in_use(tmp_path: Path, largest: int, white: int) -> None:
    save(tmp_path, "a.png", np.array([[0, largest]], np.uint16))
    save(tmp_path, "b.png", np.array([[0, 1]], np.uint16))
    assert look(paths(tmp_path)).pixels.integers == (0, white)


def test_a_range_that_is_given_is_taken(tmp_path: Path) -> None:
    save(tmp_path, "a.tif", np.array([[-3.0, 0.5, 7.0, np.nan]], np.float32))
    assert look(paths(tmp_path)).pixels.floats == (-3, 7)
    assert look(paths(tmp_path), value_range=(0, 2)).pixels == PixelFormat(integers=(0, 2), floats=(0, 2))
    save(tmp_path, "b.tif", np.array([[-3, 9]], np.int32))
    assert look(paths(tmp_path)).pixels.integers == (-3, 9)


@pytest.mark.parametrize(
    ("odd", "values", "expected"),
    [
        (-9999.0, (0, 100), (0, 100)),
        (1e6, (0, 100), (0, 100)),
        (np.nan, (0, 100), (0, 100)),
        (np.inf, (0, 100), (0, 100)),
        (-9999.0, (0.1, 0.9), (0, 1)),
        (150.0, (0, 100), (0, 150)),
        (-5.0, (5, 5), (-5, 5)),
    ],
)
def test_one_odd_pixel_does_not_choose_the_range(
    tmp_path: Path, odd: float, values: tuple[float, float], expected: tuple[float, float]
) -> None:
    ramp = np.linspace(*values, 64 * 64, dtype=np.float32).reshape(64, 64)
    save(tmp_path, "a.tif", ramp)
    ramp[0, 0] = odd
    save(tmp_path, "b.tif", ramp)
    found = look(paths(tmp_path))
    assert found.pixels.floats == pytest.approx(expected, abs=0.25)
    said = "cutting off those down to" in found.said
    assert said == (np.isfinite(odd) and not expected[0] <= odd <= expected[1])


@pytest.mark.parametrize("share", [0.002, 0.05, 0.3])
def test_a_number_for_no_data_does_not_choose_the_range(tmp_path: Path, share: float) -> None:
    values = np.linspace(0, 100, 64 * 64, dtype=np.float32)
    values[: int(share * len(values))] = -9999
    save(tmp_path, "a.tif", values.reshape(64, 64))
    low, high = look(paths(tmp_path)).pixels.floats or (0, 0)
    assert low == pytest.approx(100 * share, abs=0.25) and high == pytest.approx(100, abs=0.25)


def test_two_values_are_black_and_white(tmp_path: Path) -> None:
    save(tmp_path, "a.tif", np.where(RAMP > 2000, np.float32(1000), np.float32(-3)))
    assert look(paths(tmp_path)).pixels.floats == (-3, 1000)


def test_where_nothing_is_a_number_nothing_is_found(tmp_path: Path) -> None:
    values = np.full((200, 200), np.nan, np.float32)
    values[1, 1] = 7
    path = save(tmp_path, "a.tif", values)
    found = look(paths(tmp_path)).pixels
    assert found.floats == (7, 8) and not read_image(str(path), found).any()
    values[1, 1] = np.nan
    save(tmp_path, "a.tif", values)
    assert look(paths(tmp_path)).pixels.floats is None


def test_floats_that_are_all_the_same_are_black(tmp_path: Path) -> None:
    path = save(tmp_path, "a.tif", np.full((8, 8), 5, np.float32))
    found = look(paths(tmp_path)).pixels
    assert found.floats == (5, 6) and not read_image(str(path), found).any()


def test_mean_and_deviation_are_those_of_the_scaled_values(tmp_path: Path) -> None:
    found = look(paths(microscopy(tmp_path)), channels=2).pixels
    values = np.stack([read_image(path, found) for path in paths(tmp_path)]) / 255
    assert found.channels == 2 and found.integers == (0, 4095)
    assert np.allclose(found.mean, values.mean(axis=(0, 2, 3)), atol=1e-3)
    assert np.allclose(found.std, values.std(axis=(0, 2, 3)), atol=1e-3) and found.mean[0] < 0.2 < 0.4 < found.mean[1]
    scaled = normalize(torch.stack([read_image(path, found) for path in paths(tmp_path)]), found)
    assert scaled.mean(dim=(0, 2, 3)).abs().max() < 1e-3 and (scaled.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-3


def test_a_constant_channel_does_not_divide_by_zero(tmp_path: Path) -> None:
    save(tmp_path, "a.png", np.full((8, 8), 40, np.uint8))
    found = look(paths(tmp_path), channels=1).pixels
    assert found.mean == (round(40 / 255, 4),) and found.std == (round(1 / 255, 4),)


def test_usual_images_are_not_decoded_and_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, 3)
    monkeypatch.setattr("datamodules.first_look.read_values", lambda *_: pytest.fail("decoded"))
    assert look(paths(tmp_path)) == (PixelFormat(), "")


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_images_of_other_channels_are_said(tmp_path: Path, kind: type) -> None:
    write_images(tmp_path, 3)
    (tmp_path / "broken.png").write_bytes(b"no image")
    save_pages(tmp_path, "five.tif", np.zeros((5, 8, 8), kind))
    found = look(paths(tmp_path))
    assert f"1 have other channels and will be left out: {tmp_path / 'five.tif'}: it has 5 pages" in found.said
    assert "broken" not in found.said
    assert look([b"nowhere.png"], 1).pixels == PixelFormat(1), "left to those who read it"


def test_of_a_large_folder_some_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.first_look.LOOKED_AT", 4)
    for number in range(10):
        save(tmp_path, f"{number}.png", np.full((2, 2), 2**number, np.uint16))
    found = look(paths(tmp_path))
    assert "Of 4 images" in found.said and found.pixels.integers == (0, 1023), "the last one is among them"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels=0: give 1 for gray"),
        ({"value_range": (5, 5)}, "value_range="),
        ({"normalization": "mine"}, "data.normalization='mine': choose one of imagenet, found"),
        ({"channels": 2, "normalization": "imagenet"}, "data.normalization='imagenet' is of 3 channels"),
        ({"channels": 1, "rand_augment": True}, "data.channels=1 with data.rand_augment"),
        ({"vertical_flip": 2.0}, "data.vertical_flip=2.0: give probabilities"),
    ],
)
def test_impossible_formats_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_images(tmp_path, **arguments)


def test_a_format_is_what_a_checkpoint_can_hold() -> None:
    pixels = PixelFormat(2, (0, 4095), (-1.0, 1.0), (0.1, 0.2), (0.3, 0.4))
    content = pixels.to_dict()
    assert PixelFormat.from_dict(content) == pixels
    assert PixelFormat.from_dict({name: list(v) if isinstance(v, tuple) else v for name, v in content.items()}) == pixels
    with pytest.raises(ValueError, match="a number for each of 2 channels"):
        PixelFormat(2, mean=(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="std > 0"):
        PixelFormat(1, std=(0.0,))


def test_denormalizing_gives_the_bytes_back() -> None:
    pixels = PixelFormat(2, mean=(0.1, 0.7), std=(0.05, 0.3))
    images = torch.randint(0, 256, (3, 2, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(denormalize(normalize(images, pixels), pixels), images)
    shown = to_colors(normalize(images, pixels), pixels)
    torch.testing.assert_close(shown, images[:, [0, 1, 1]] / 255, atol=1e-5, rtol=0)
    gray = PixelFormat(1)
    assert to_colors(normalize(images[:, :1], gray), gray).shape == (3, 3, 4, 4)


@pytest.mark.parametrize("vertical_flip", [0.0, 1.0])
def test_turns_are_of_the_whole_image(vertical_flip: float) -> None:
    image = torch.arange(12).view(1, 3, 4)
    torch.manual_seed(0)
    seen = {tuple(Turns(vertical_flip, True)(image).flatten().tolist()) for _ in range(60)}
    first = image.flip(1) if vertical_flip else image
    assert seen == {tuple(first.rot90(turns, (1, 2)).flatten().tolist()) for turns in range(4)}
    torch.manual_seed(0)
    flipped = [bool(Turns(0.25, False)(image)[0, 0, 0]) for _ in range(400)]
    assert 60 < sum(flipped) < 140


def test_training_images_are_turned_and_held_out_ones_are_not(tmp_path: Path) -> None:
    top = np.zeros((16, 16), np.uint8)
    top[:8] = 255
    for number in range(40):
        save(tmp_path, f"{number:02d}.png", top)
    sides = {}
    for name, settings in {"plain": {}, "turned": {"rotate": True}, "flipped": {"vertical_flip": 0.5}}.items():
        data = small_images(tmp_path, crop_scale=(1.0, 1.0), batch_size=32, **settings)
        data.setup("fit")
        images = next(iter(data.train_dataloader())).images
        sides[name] = {tuple(image[0, [0, -1, 4, 4], [4, 4, 0, -1]].tolist()) for image in images}
        assert next(iter(data.val_dataloader())).images[:, 0, :8].min() == 255
    up, down = (255, 0, 255, 255), (0, 255, 0, 0)
    assert sides["plain"] == {up} and sides["flipped"] == {up, down} and len(sides["turned"]) == 4


def test_both_views_of_a_pair_are_turned_alike(tmp_path: Path) -> None:
    top = np.zeros((16, 16, 3), np.uint8)
    top[:8] = (200, 150, 100)
    for number in range(40):
        save(tmp_path, f"{number:02d}.png", top)
    data = small_views(tmp_path, crop_scale=(1.0, 1.0), batch_size=32, rotate=True)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    brighter = [
        part[:, :, 0].float().mean(dim=(1, 2)) > part[:, :, -1].float().mean(dim=(1, 2))
        for part in (batch.sources, batch.targets)
    ]
    assert brighter[0].any() and not brighter[0].all()
    assert (brighter[0] == brighter[1]).float().mean() > 0.85, "a few sources are solarized"


def fitted(data: ImageFolder, root: Path, **changes: Any) -> Path:
    model = small_ijepa(encoder_depth=2, channels=data.pixels.channels, **changes)
    run = trainer(root, max_epochs=1, enable_checkpointing=False, limit_val_batches=1)
    run.fit(model, data)
    run.save_checkpoint(root / "a.ckpt")
    return root / "a.ckpt"


def test_a_model_keeps_how_it_has_seen_images(tmp_path: Path) -> None:
    folder = microscopy(tmp_path / "images")
    data = small_images(folder, channels=2)
    checkpoint = fitted(data, tmp_path / "run")
    model = load(checkpoint)
    assert (
        model.pixels == data.pixels
        and model.pixels.integers == (0, 4095)
        and model.context_encoder.vit.patch_embed.proj.in_channels == 2
    )
    with Image.open(folder / "03.tif") as image:
        own = model.transform(image)
    path = str(folder / "03.tif")
    assert own.shape == (2, 16, 16) and torch.equal(own, model.transform(read_image(path, data.pixels)))
    # A darker recording of the same microscope: alone it would be taken to have 8 bits.
    dark = tmp_path / "dark"
    for number in range(12):
        save_pages(dark, f"{number:02d}.tif", np.full((2, 20, 24), 100, np.uint16))
    other = small_images(dark, channels=2)
    run = trainer(tmp_path / "run", limit_predict_batches=1)
    run.validate(
        small_ijepa(encoder_depth=2, channels=2), small_images(dark, channels=2), ckpt_path=checkpoint, verbose=False
    )
    rows: list[Tensor] = run.predict(model, other, return_predictions=True)
    assert other.pixels == model.pixels == data.pixels
    direct = model(torch.full((1, 2, 16, 16), 100 * 256 // 4096, dtype=torch.uint8))
    torch.testing.assert_close(rows[0][:1], direct)
    given = small_images(dark, channels=2, value_range=(0, 200))
    trainer(tmp_path / "run", limit_predict_batches=1).predict(model, given, return_predictions=False)
    assert given.pixels.integers == (0, 200) and given.pixels.mean == data.pixels.mean, "a range that is given wins"
    assert model.pixels == given.pixels, "and is the model's from then on"


def test_of_what_a_model_never_saw_the_data_has_the_range(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(12):
        save(tmp_path / "bytes", f"{number:02d}.png", np.full((20, 24), 20 * number, np.uint8))
        save(tmp_path / "deep", f"{number:02d}.tif", RAMP)
        save(tmp_path / "deeper", f"{number:02d}.tif", RAMP * 4)
    model = load(fitted(small_images(tmp_path / "bytes", channels=1), tmp_path / "run"))
    mean = model.pixels.mean
    assert model.pixels.integers is None and mean != (0.5,)
    data = small_images(tmp_path / "deep", channels=1)
    trainer(tmp_path, limit_predict_batches=1).predict(model, data, return_predictions=False)
    assert data.pixels == model.pixels == PixelFormat(1, (0, 4095), None, mean, model.pixels.std)
    other = small_images(tmp_path / "deeper", channels=1)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        trainer(tmp_path, limit_predict_batches=1).predict(model, other, return_predictions=False)
    assert other.pixels.integers == (0, 4095)
    assert (
        "Integers from 0 (black) to 4095 (white), as the model was trained; of these images alone it would be 0 to 16383"
        in (caplog.text)
    )


def test_a_probe_keeps_the_format_that_it_learned_from_its_data(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        microscopy(tmp_path / "images" / name, 3)
    run = trainer(tmp_path)
    run.strategy.connect(small_ijepa(encoder_depth=2))
    run.save_checkpoint(tmp_path / "imported.ckpt", weights_only=True)
    probe, data = LinearProbe(str(tmp_path / "imported.ckpt")), small_images(tmp_path / "images", normalization="found")
    fit = trainer(tmp_path / "probe", max_steps=1)
    fit.fit(probe, data)
    fit.save_checkpoint(tmp_path / "probe.ckpt")
    assert load_probe(tmp_path / "probe.ckpt", LinearProbe).pixels == data.pixels != PixelFormat()


def test_a_resumed_model_sees_images_as_before(tmp_path: Path) -> None:
    folder = microscopy(tmp_path / "images")
    checkpoint = fitted(small_images(folder, channels=2), tmp_path / "run")
    before = load(checkpoint).pixels
    save_pages(folder, "zz.tif", np.full((2, 20, 24), 60000, np.uint16))  # one bright image more
    data, model = small_images(folder, channels=2), small_ijepa(encoder_depth=2, channels=2)
    with pytest.warns(UserWarning, match="goes on with other samples"):
        trainer(tmp_path / "run", max_epochs=2).fit(model, data, ckpt_path=checkpoint)
    assert data.pixels == model.pixels == before


def test_probes_and_exports_see_images_as_the_model_does(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        microscopy(tmp_path / "images" / name)
    data = small_images(tmp_path / "images", channels=2)
    checkpoint = fitted(data, tmp_path / "run")
    again = small_images(tmp_path / "images", channels=2, normalization="found")
    again.pixels = PixelFormat(2)
    probe = KNNProbe(str(checkpoint))
    trainer(tmp_path / "probe", limit_test_batches=1.0).test(probe, again, verbose=False)
    assert again.pixels == data.pixels == probe.pixels
    with pytest.raises(ValueError, match="reads images of 2 channels; CompletionProbe decodes colors"):
        CompletionProbe(str(checkpoint))
    export_weights(str(checkpoint), str(tmp_path / "timm"), "timm")
    import timm

    encoder = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert tuple(encoder.pretrained_cfg["mean"]) == data.pixels.mean and encoder.pretrained_cfg["input_size"] == (2, 16, 16)
    images = torch.randn(3, 2, 16, 16)
    torch.testing.assert_close(encoder(images), load(checkpoint)(images), atol=1e-5, rtol=1e-4)
    assert load_encoder(tmp_path / "timm").channels == 2
    for layout, name in (("timm", "timm"), ("huggingface", "hf"), ("safetensors", "encoder.safetensors")):
        export_weights(str(checkpoint), str(tmp_path / name), layout)  # type: ignore[arg-type]
        assert load(tmp_path / name).pixels == data.pixels, layout


def test_weights_that_never_saw_images_take_the_format_of_the_data(tmp_path: Path) -> None:
    """Weights from elsewhere know nothing of the range of a camera."""
    folder = tmp_path / "images"
    for number in range(12):
        save(folder, f"{number:02d}.tif", RAMP)
    run = trainer(tmp_path)
    run.strategy.connect(small_ijepa())
    run.save_checkpoint(tmp_path / "imported.ckpt", weights_only=True)
    model, data = load(tmp_path / "imported.ckpt"), small_images(folder)
    assert model.known_pixels is None and model.pixels == PixelFormat()
    trainer(tmp_path, limit_predict_batches=1).predict(model, data, return_predictions=False)
    assert data.pixels.integers == (0, 4095) and model.pixels == data.pixels


def test_training_that_starts_from_weights_keeps_their_normalization(tmp_path: Path) -> None:
    folder = microscopy(tmp_path / "images")
    source = load(fitted(small_images(folder, channels=2), tmp_path / "run"))
    model = small_ijepa(encoder_depth=2, channels=2)
    start_from(model, tmp_path / "run" / "a.ckpt")
    assert model.pixels == source.pixels != PixelFormat(2)


def test_models_and_data_of_other_channels_are_refused(tmp_path: Path) -> None:
    data = small_images(microscopy(tmp_path / "images"), channels=2)
    with pytest.raises(ValueError, match=r"The model has channels=3 but data.channels=2: set both"):
        trainer(tmp_path, max_epochs=1).fit(small_ijepa(), data)
    assert agree(None, 3, None) is None and agree(PixelFormat(), 3, object()) == PixelFormat()
    with pytest.raises(ValueError, match=r"\(B, 2, 16, 16\)"):
        small_ijepa(channels=2)(torch.zeros(1, 3, 16, 16))


def test_thumbnails_are_no_channels_and_bits_are_black_and_white(tmp_path: Path) -> None:
    first, small = Image.fromarray(RAMP), Image.fromarray(RAMP[:4, :4])
    first.save(tmp_path / "camera.tif", save_all=True, append_images=[small])
    assert np.array_equal(read_image(str(tmp_path / "camera.tif"), PixelFormat(1, (0, 4095)))[0], RAMP // 16)
    bits = [Image.fromarray(RAMP > 64 * limit) for limit in (10, 20)]
    bits[0].save(tmp_path / "bits.tif", save_all=True, append_images=bits[1:])
    assert np.array_equal(read_image(str(tmp_path / "bits.tif"), PixelFormat(2))[1], (RAMP > 64 * 20) * 255)


def test_a_checkpoint_from_before_goes_on_where_nothing_new_is_in_use(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 12)
    plain, turned, ranged = (
        small_images(tmp_path / "images", **changes) for changes in ({}, {"rotate": True}, {"value_range": (0, 9)})
    )
    for data in (plain, turned, ranged):
        data.setup("fit")
    before = {"images", "image_size", "crop_scale", "flip", "rand_augment", "views", "seed"}
    assert set(plain.order()) == before
    assert turned.order()["rotate"] is True and ranged.order()["value_range"] == [0, 9]


def test_a_format_can_be_a_list_and_a_key() -> None:
    pixels = PixelFormat(1, [0, 4095], None, [0.5], [0.2])  # type: ignore[arg-type]
    assert hash(pixels) == hash(PixelFormat(1, (0, 4095), None, (0.5,), (0.2,)))
    assert normalize(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), pixels).shape == (1, 1, 2, 2)


def test_tasks_of_other_depth_are_read_in_one_range(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for number in range(6):
            save(tmp_path / "bytes" / name, f"{number}.png", np.full((8, 8), number, np.uint8))
            save(tmp_path / "deep" / name, f"{number}.tif", RAMP)
    data = MultiTask({task: small_images(tmp_path / task, batch_size=2) for task in ("bytes", "deep")})
    data.setup("fit")
    assert data.pixels.integers == (0, 4095) and data.folders["deep"].pixels == data.pixels
    assert agree(data.pixels, 3, data) == data.pixels and data.folders["deep"].pixels == data.pixels


def test_tasks_are_normalized_alike(tmp_path: Path) -> None:
    for task, low in (("one", 0), ("two", 128)):
        for name in ("a", "b"):
            for number in range(6):
                save(tmp_path / task / name, f"{number}.png", np.full((8, 8), low + number, np.uint8))
    folders = {task: small_images(tmp_path / task, normalization="found", batch_size=2) for task in ("one", "two")}
    data = MultiTask(folders)
    data.setup("fit")
    assert folders["one"].pixels == folders["two"].pixels == data.pixels != PixelFormat()
    data.pixels = PixelFormat(mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    assert folders["two"].pixels.mean == (0.1, 0.2, 0.3)
    with pytest.raises(ValueError, match=r"channels is \{'one': 3, 'two': 1\}"):
        MultiTask({"one": small_images(tmp_path / "one"), "two": small_images(tmp_path / "two", channels=1)})


def test_what_is_found_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = small_images(microscopy(tmp_path / "images"), channels=2)
    (tmp_path / "images" / "bad.tif").write_bytes(b"")
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        data.setup("fit")
    assert "16-bit gray in 2 pages" in caplog.text and "4095 (white)" in caplog.text
    assert IMAGENET_MEAN != data.pixels.mean
