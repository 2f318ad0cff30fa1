"""Data sets by name, with torchvision's downloads replaced by ones that need no network."""

from pathlib import Path

import pytest
from conftest import small_images, write_images
from PIL import Image

from datamodules import downloads
from datamodules.new_folder import new_folder


class Pixels:
    """As CIFAR-10 and STL-10: images in memory."""

    classes = ("cat", "dog")

    def __init__(self, root: str, train: bool) -> None:
        Path(root).mkdir(parents=True, exist_ok=True)
        self.count = 6 if train else 4

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (16, 16), (number, 0, 0)), number % 2


class Files:
    """As Imagenette: files in an archive, and several names per class."""

    classes = (("church", "temple"), ("truck",))

    def __init__(self, root: str, train: bool) -> None:
        folder = Path(root) / ("train" if train else "val")
        write_images(folder, 4)
        self._samples = [(str(path), number % 2) for number, path in enumerate(sorted(folder.iterdir()))]

    def __len__(self) -> int:
        return len(self._samples)


@pytest.mark.parametrize(
    ("name", "source", "classes"), [("cifar10", Pixels, ["cat", "dog"]), ("imagenette", Files, ["church", "truck"])]
)
def test_a_name_becomes_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name, source, classes) -> None:
    monkeypatch.setitem(downloads.SOURCES, name, source)
    root = tmp_path / "images"
    data = small_images(root, download=name, batch_size=2)
    data.prepare_data()
    data.setup("fit")
    assert data.classes == classes
    train, val = len(data._samples["train"].labels), len(data._samples["val"].labels)
    assert (train, val) == ((6, 4) if source is Pixels else (4, 4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"], "nothing is left lying about"


def test_a_folder_that_is_there_is_kept(image_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(downloads.SOURCES, "cifar10", None)
    small_images(image_root, download="cifar10").prepare_data()


def test_a_download_that_breaks_off_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(root: str, train: bool) -> Pixels:
        if not train:
            raise OSError("the line is dead")
        return Pixels(root, train)

    monkeypatch.setitem(downloads.SOURCES, "cifar10", broken)
    with pytest.raises(OSError, match="the line is dead"):
        downloads.download("cifar10", tmp_path / "images")
    assert not list(tmp_path.iterdir()), "nothing is left lying about"
    monkeypatch.setitem(downloads.SOURCES, "cifar10", Pixels)
    downloads.download("cifar10", tmp_path / "images")
    assert (tmp_path / "images" / "val" / "dog").is_dir()


def test_what_is_not_ours_is_never_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(downloads.SOURCES, "cifar10", Pixels)
    mine = [tmp_path / name / "mine" / "thesis.txt" for name in ("images.part", "images.download")]
    for file in mine:
        file.parent.mkdir(parents=True)
        file.touch()
    downloads.download("cifar10", tmp_path / "images")
    assert all(file.exists() for file in mine) and (tmp_path / "images" / "train").is_dir()


def test_several_nodes_make_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, files = tmp_path / "images", []

    def overtaken(where: str, train: bool) -> Pixels:
        if not train and not root.exists():  # another node starts later, and is ready before this one
            downloads.download("cifar10", root)
            files.extend(path.stat().st_ino for path in root.rglob("*.png"))
        return Pixels(where, train)

    calls = iter([overtaken, overtaken, Pixels, Pixels])
    monkeypatch.setitem(downloads.SOURCES, "cifar10", lambda where, train: next(calls)(where, train))
    downloads.download("cifar10", root)
    assert files == [path.stat().st_ino for path in root.rglob("*.png")], "the first one stays as it is"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"], "the other one is dropped"


def test_a_folder_that_cannot_be_named_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), new_folder(tmp_path / "file"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_new_folder_is_open_to_whom_a_folder_is_open_to(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "new"):
        pass
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "deep" / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.download='mnist': choose one of cifar10, stl10, imagenette"):
        small_images(tmp_path, download="mnist")


def test_a_new_folder_is_filled_next_to_its_place_by_a_name_that_says_whose_it_is(tmp_path: Path) -> None:
    root = tmp_path / "not" / "there" / "images"
    with new_folder(root) as folder:
        assert folder.parent.parent == root.parent and folder.parent.name.startswith("images.part-")
        (folder / "a").touch()
        assert not root.exists()
    assert [path.name for path in root.parent.iterdir()] == ["images"] and (root / "a").exists()
