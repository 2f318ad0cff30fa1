"""What is found in a folder, what is left out, and which fraction of each class is drawn."""

import logging
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import small_images, write_images

from datamodules.image_files import EXTENSIONS, describe, draw_per_class, printable, read_list, scan
from datamodules.rng import seeded_generator


def below(folder: Path, paths: list[bytes]) -> list[bytes]:
    return [os.path.relpath(path, os.fsencode(folder)) for path in paths]


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_links_are_followed_and_may_lead_in_circles(tmp_path: Path) -> None:
    root = tmp_path / "root"
    touch(
        tmp_path / "far" / "1.jpg", tmp_path / "far" / "deep" / "2.jpg", tmp_path / "class" / "3.jpg", root / "a" / "0.jpg"
    )
    (root / "a" / "linked").symlink_to(tmp_path / "far")
    (root / "a" / "twice").symlink_to(tmp_path / "far")
    (root / "a" / "round").symlink_to(root / "a")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "self").symlink_to(root / "a" / "self")
    (root / "a" / "9.jpg").symlink_to(tmp_path / "class" / "3.jpg")
    (root / "b").symlink_to(tmp_path / "class")
    (root / "b" / "linked").symlink_to(tmp_path / "far")
    found = scan(root)
    assert found.classes == ["a", "b"]
    assert below(root, found.samples.paths.tolist()) == [
        b"a/0.jpg", b"a/9.jpg", b"a/linked/1.jpg", b"a/linked/deep/2.jpg",
        b"b/3.jpg", b"b/linked/1.jpg", b"b/linked/deep/2.jpg",
    ]  # fmt: skip
    assert found.samples.labels.tolist() == [0] * 4 + [1] * 3


def test_a_class_that_is_a_link_to_all_classes_is_refused(tmp_path: Path) -> None:
    touch(tmp_path / "a" / "0.jpg")
    (tmp_path / "all").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"all holds no image: fill it or remove it"):
        scan(tmp_path)


def test_the_order_is_that_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["Z/1.jpg", "a-b/1.jpg", "a/B.jpg", "a/a.jpg", "a/c/0.jpg", "a/ä.jpg", "é/1.jpg"]
    touch(*(tmp_path / name for name in names))
    (tmp_path / "a" / "d").symlink_to(tmp_path / "a" / "c")  # 0.jpg is found in c, whichever comes first
    assert below(tmp_path, scan(tmp_path).samples.paths.tolist()) == [
        os.fsencode(name) for name in ("Z/1.jpg", "a/B.jpg", "a/a.jpg", "a/c/0.jpg", "a/ä.jpg", "a-b/1.jpg", "é/1.jpg")
    ]
    entries = os.scandir
    first = scan(tmp_path).samples.paths.tolist()

    class Backwards(list):
        def __enter__(self) -> "Backwards":
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(os, "scandir", lambda folder: Backwards(sorted(entries(folder), key=lambda e: e.name, reverse=True)))
    assert scan(tmp_path).samples.paths.tolist() == first


def test_names_in_any_encoding(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """From the scan to the pixels, the list and the message."""
    for name in (b"caf\xe9", b"plain"):
        folder = tmp_path / os.fsdecode(name)
        write_images(folder, 6)
        (folder / "0000.jpg").rename(folder / os.fsdecode(b"\xff\xfe.jpg"))
    data = small_images(tmp_path, batch_size=2)
    data.setup("fit")
    assert data.classes == [os.fsdecode(b"caf\xe9"), "plain"]
    assert sum(len(batch.images) for batch in data.train_dataloader()) == 10 and not recwarn
    (tmp_path / "list.txt").write_bytes(b"caf\xe9/\xff\xfe.jpg\nplain/0001.jpg\n./plain//0002.jpg\n")
    with pytest.warns(UserWarning, match="loose files next to class folders: 1"):
        listed = small_images(tmp_path, batch_size=1, file_list=str(tmp_path / "list.txt"))
        listed.setup("fit")
    assert listed._samples["train"].labels.tolist() == [0, 1, 1]
    bad = tmp_path / os.fsdecode(b"caf\xe9/\xff\xfe.jpg")
    bad.write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"caf\\xe9/\\xff\\xfe.jpg cannot be decoded") as said:
        list(listed.train_dataloader())
    str(said[0].message).encode()  # every stream can print it
    assert printable("ä/b") == "ä/b"


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "train" / "a", 3)
    write_images(tmp_path / "val" / "a", 2)
    touch(*(tmp_path / "train" / name for name in ("a/1.txt", "a/b/2.TXT", "a/3.psd", "a/README", "loose.jpg", "list.csv")))
    found = scan(tmp_path / "train")
    assert found.ignored == Counter({".txt": 2, ".psd": 1, "": 1}) and found.num_loose == 2
    with (
        caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"),
        pytest.warns(UserWarning) as said,
    ):
        small_images(tmp_path, batch_size=1).setup("fit")
    assert [str(warning.message) for warning in said] == [
        f"Left out of {tmp_path / 'train'}: files with other endings than {' '.join(EXTENSIONS)}: "
        "2 .txt, 1 without ending, 1 .psd; loose files next to class folders: 2."
    ]
    assert [record.message for record in caplog.records] == [
        f"Found 3 images in 1 class in {tmp_path / 'train'}.",
        f"Found 2 images in 1 class in {tmp_path / 'val'}.",
    ]


@pytest.mark.parametrize("folder", [".ipynb_checkpoints", "@eaDir", "__MACOSX", "lost+found"])
def test_folders_of_the_system_are_no_classes_and_hold_no_images(folder: str, tmp_path: Path) -> None:
    for place in ("flat", "flat/inner", "classes", "classes/a", "classes/b/deeper"):
        write_images(tmp_path / place / folder, 2)
    (tmp_path / "empty" / folder).mkdir(parents=True)
    for place, count in (("flat", 3), ("classes/a", 4), ("classes/b", 5), ("empty", 1)):
        write_images(tmp_path / place, count)
    classes, empty = scan(tmp_path / "classes"), scan(tmp_path / "empty")
    assert classes.classes == ["a", "b"] and classes.samples.labels.tolist() == [0] * 4 + [1] * 5 and not classes.num_loose
    assert classes.hidden == Counter({folder: 3})
    assert empty.hidden == Counter({folder: 1}) and not empty.classes and len(empty.samples.paths) == 1
    (tmp_path / "flat" / "inner").rename(tmp_path / "flat" / "..inner")  # hidden, too
    flat = scan(tmp_path / "flat")
    assert not flat.classes and len(flat.samples.paths) == 3 and flat.hidden == Counter({folder: 1, "..inner": 1})
    assert describe(tmp_path, classes) == (
        f"Found 9 images in 2 classes in {tmp_path}.",
        f"Left out of {tmp_path}: hidden folders and those of the system: 3 {folder}.",
    )


def test_every_ending_is_found(tmp_path: Path) -> None:
    names = ["a.bmp", "b.GIF", "c.jpeg", "d.JPG", "e.png", "f.tif", "g.TIFF", "h.webp", "i.jfif", "j.JPE", "k.jp2"]
    names += ["l.avif", "m.pbm", "n.pgm", "o.ppm", "p.pnm"]
    assert {Path(name).suffix.lower() for name in names} == set(EXTENSIONS)
    touch(*(tmp_path / name for name in names))
    assert below(tmp_path, scan(tmp_path).samples.paths.tolist()) == [name.encode() for name in names]


@pytest.mark.parametrize("line", ["../a/0.jpg", "a/../../root/a/0.jpg", "/a/0.jpg"])
def test_a_list_does_not_lead_out_of_the_folder(tmp_path: Path, line: str) -> None:
    touch(tmp_path / "root" / "a" / "0.jpg", tmp_path / "a" / "0.jpg")
    (tmp_path / "list.txt").write_text(f"a/0.jpg\n{line}\n")
    everything = scan(tmp_path / "root").samples
    with pytest.raises(ValueError, match=r"list.txt names .*0.jpg, outside of .*root: write paths relative to that folder"):
        read_list(tmp_path / "list.txt", tmp_path / "root", everything)


def test_a_list_is_compared_with_what_was_found(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("a/0.jpg", "a/1.jpg", "b/2.jpg")))
    (tmp_path / "list").write_text("b/2.jpg\r\n\r\n a/../a/0.jpg \n")
    everything = scan(tmp_path).samples
    listed = read_list(tmp_path / "list", tmp_path, everything)
    assert below(tmp_path, listed.paths.tolist()) == [b"b/2.jpg", b"a/0.jpg"] and listed.labels.tolist() == [1, 0]
    (tmp_path / "list").write_text("b/2.jpg\nc/2.jpg\nlist\n")
    with pytest.raises(FileNotFoundError, match=r"2 of 3 images of .*list are not among those of .*, first c/2.jpg"):
        read_list(tmp_path / "list", tmp_path, everything)
    (tmp_path / "list").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        read_list(tmp_path / "list", tmp_path, everything)


def test_the_only_image_of_a_class_is_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, count in (("alone", 1), ("many", 10), ("pair", 2)):
        write_images(tmp_path / name, count)
    data = small_images(tmp_path, val_fraction=0.9)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        data.setup("fit")
    assert data._samples["train"].labels.tolist() == [0, 1, 2]
    assert sorted(data._samples["val"].labels.tolist()) == [1] * 9 + [2]
    assert caplog.records[-1].message == "1 of 3 classes have one image each, which is not held out."


def test_nothing_to_hold_out_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / name, 1)
    with pytest.raises(ValueError, match="too few images to hold out 20% of each class"):
        small_images(tmp_path).setup("fit")


@pytest.mark.parametrize("fraction", [0.001, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("spare", [0, 1])
def test_a_fraction_of_each_class_is_drawn(fraction: float, spare: int) -> None:
    labels = torch.tensor([-1, 3, 3, 0, 0, 0, 0, 0, 0, 3, 7, 3, 0, 0])
    chosen = draw_per_class(labels, fraction, seeded_generator(1), spare)
    assert chosen.dtype == torch.bool and torch.equal(chosen, draw_per_class(labels, fraction, seeded_generator(1), spare))
    for label in labels.unique():
        size = int((labels == label).sum())
        assert chosen[labels == label].sum() == min(max(1, round(fraction * size)), size - spare)


def test_each_image_is_drawn_as_often() -> None:
    labels = torch.tensor([0] * 4 + [1] * 8)[torch.randperm(12, generator=seeded_generator(0))]
    generator = seeded_generator(0)
    drawn = sum(draw_per_class(labels, 0.5, generator).int() for _ in range(2000))
    assert ((drawn - 1000).abs() < 100).all(), "within 4.5 standard deviations"
