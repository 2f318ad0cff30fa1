"""What is found in a folder, and what is left out."""

import logging
import os
from collections import Counter
from pathlib import Path

import pytest
from conftest import small_images, touch, write_images

from datamodules.image_files import EXTENSIONS, describe, printable, scan


def below(folder: Path, paths: list[bytes]) -> list[bytes]:
    return [os.path.relpath(path, os.fsencode(folder)) for path in paths]


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
