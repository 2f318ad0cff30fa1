"""Folders of images: what is found, how it is cut, and what is said when something is wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_images, write_images
from PIL import ExifTags, Image
from torchvision.transforms.v2.functional import pil_to_tensor

from datamodules.decoding import read_image
from datamodules.image_datasets import UnreadableImageWarning
from datamodules.pixel_format import IMAGENET_MEAN, IMAGENET_STD
from datamodules.preprocessing import normalize


def ready(root: Path, **changes):
    data = small_images(root, **changes)
    data.setup("fit")
    return data


def files(data, split: str) -> list[str]:
    return ["/".join(Path(path.decode()).parts[-2:]) for path in data._samples[split].paths]


def test_classes_without_a_split_hold_out_a_fraction_of_each(image_root: Path) -> None:
    data = ready(image_root)
    assert data.classes == ["ant", "bee"] and data.num_classes == 2
    train, val = files(data, "train"), files(data, "val")
    assert (len(train), len(val)) == (24, 6) and not set(train) & set(val)
    assert [name.startswith("bee") for name in val] == data._samples["val"].labels.tolist()
    assert sorted(data._samples["val"].labels.tolist()) == [0] * 3 + [1] * 3
    assert len({name[:3] for name in val[:3]}) == 2, "the order is mixed"
    assert files(ready(image_root), "val") == val, "the same seed gives the same split"
    assert files(ready(image_root, seed=1), "val") != val


def test_train_and_val_folders_and_flat_folders(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        for name in ("x", "y"):
            write_images(tmp_path / "labeled" / split / name, count)
        write_images(tmp_path / "flat" / split, count)
    labeled = ready(tmp_path / "labeled", batch_size=2)
    assert (len(files(labeled, "train")), len(files(labeled, "val"))) == (6, 4)
    flat = ready(tmp_path / "flat", batch_size=2)
    assert (len(files(flat, "train")), len(files(flat, "val"))) == (3, 2)
    assert flat.num_classes == 0
    assert next(iter(flat.train_dataloader())).labels.tolist() == [-1, -1]
    only_train = ready(tmp_path / "flat" / "train", batch_size=2, val_fraction=0.4)
    assert (len(files(only_train, "train")), len(files(only_train, "val"))) == (2, 1)


def test_fraction_per_class_is_balanced_and_seeded(image_root: Path) -> None:
    tenth = ready(image_root, fraction=0.25)
    assert tenth._samples["train"].labels.tolist() == [0] * 3 + [1] * 3
    assert files(tenth, "train") == files(ready(image_root, fraction=0.25), "train")
    assert set(files(tenth, "train")) < set(files(ready(image_root), "train"))
    assert files(ready(image_root, fraction=0.001), "train").__len__() == 2, "at least one image of each class"


def test_list_names_the_training_images(image_root: Path, tmp_path: Path) -> None:
    names = ["bee/0003.jpg", "ant/0001.jpg"]
    (tmp_path / "list.txt").write_text("\n".join(names) + "\n\n")
    data = ready(image_root, file_list=str(tmp_path / "list.txt"), batch_size=2)
    assert files(data, "train") == names and data._samples["train"].labels.tolist() == [1, 0]
    assert not set(files(data, "val")) & set(names)
    (tmp_path / "list.txt").write_text("ant/0001.jpg\nant/none.jpg\n")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images .* first ant/none.jpg"):
        ready(image_root, file_list=str(tmp_path / "list.txt"))


def test_batches_are_uint8_then_normalized_on_the_device(image_root: Path) -> None:
    data = ready(image_root)
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape == (4, 3, 16, 16) and batch.images.dtype == torch.uint8
    assert batch.key[:2] == (0, 0)
    done = data.on_after_batch_transfer(batch, 0)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(done.images, (batch.images / 255 - mean) / std)
    torch.testing.assert_close(normalize(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8))[0, 0].item(), (1 - 0.485) / 0.229)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("num_workers", [2, 4])
def test_crops_do_not_depend_on_workers(image_root: Path, num_workers: int) -> None:
    alone, shared = (ready(image_root, flip=0.5, num_workers=n).train_dataloader() for n in (0, num_workers))
    for epoch in (0, 1):
        for loader in (alone, shared):
            loader.sampler.set_epoch(epoch)
        for mine, theirs in zip(alone, shared, strict=True):
            assert torch.equal(mine.images, theirs.images) and mine.key == theirs.key


def test_an_image_is_cropped_anew_in_each_epoch_and_whole_if_asked(image_root: Path, tmp_path: Path) -> None:
    loader = ready(image_root, crop_scale=(0.3, 0.5)).train_dataloader()
    first = loader.loader.dataset.__getitems__([(0, 5), (0, 6)])
    again = loader.loader.dataset.__getitems__([(0, 6), (0, 5)])
    later = loader.loader.dataset.__getitems__([(1, 5)])
    assert torch.equal(first.images, again.images.flip(0)), "a function of the index, not of the batch"
    assert not torch.equal(first.images[:1], later.images)
    state = torch.get_rng_state()
    loader.loader.dataset.__getitems__([(0, 5)])
    assert torch.equal(state, torch.get_rng_state()), "the global generator is left alone"
    write_images(tmp_path, 5, size=(16, 16))
    whole = ready(tmp_path, crop_scale=(1, 1)).train_dataloader().loader.dataset
    assert torch.equal(whole.__getitems__([(0, 2)]).images[0], whole.decode(2))


def test_each_image_has_a_crop_of_its_own(tmp_path: Path) -> None:
    gradient = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    for number in range(5):
        gradient.save(tmp_path / f"{number}.png")
    crops = ready(tmp_path, crop_scale=(0.3, 0.5)).train_dataloader().loader.dataset.__getitems__([(0, 0), (0, 1)])
    assert not torch.equal(crops.images[0], crops.images[1]), "the same image twice"


def test_held_out_images_are_seen_once_in_order_and_cut_in_the_middle(tmp_path: Path) -> None:
    halves = Image.new("RGB", (100, 64))
    halves.paste((255, 255, 255), (50, 0, 100, 64))  # black left of the middle, white right of it
    for name in ("a", "b", "c", "d", "e"):
        halves.save(tmp_path / f"{name}.png")
    data = ready(tmp_path, val_fraction=0.6, batch_size=2, image_size=(8, 12))
    batches = list(data.val_dataloader())
    assert [len(batch.images) for batch in batches] == [2, 1]
    image = batches[0].images[0]
    assert image.shape == (3, 8, 12)
    assert image[:, :, :5].max() == 0 and image[:, :, 7:].min() == 255


def test_unreadable_images_are_named_once_and_never_end_the_run(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "a", 6)
    write_images(tmp_path / "val" / "a", 3)
    bad = tmp_path / "train" / "a" / "0002.jpg"
    bad.write_bytes(bad.read_bytes()[:100])
    (tmp_path / "val" / "a" / "0000.jpg").write_bytes(b"no image")
    data = ready(tmp_path, batch_size=3)
    loader = data.train_dataloader()
    with pytest.warns(UnreadableImageWarning, match=r"0002.jpg cannot be decoded .* 1 of 6 so far"):
        first = list(loader)
    assert [len(batch.images) for batch in first] == [3, 3], "another image stands in"
    assert len(list(loader)) == 2  # and no second warning: warnings are errors here
    with pytest.warns(UnreadableImageWarning, match="0000.jpg"):
        (held_out,) = list(data.val_dataloader())
    assert len(held_out.images) == 2, "a held-out image is not replaced by another, which would count twice"


def test_16_bits_are_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 16), 32768, dtype=np.uint16)).save(tmp_path / "deep.png")
    write_images(tmp_path, 1, size=(16, 16))
    images = ready(tmp_path, val_fraction=0.5, batch_size=1).val_dataloader().dataset
    images.samples = images.samples._replace(paths=np.array([str(tmp_path / "deep.png").encode()]))
    assert images.decode(0)[:, 3, 3].tolist() == [128, 128, 128]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "CMYK"])
def test_images_of_all_modes_are_read_as_rgb(tmp_path: Path, mode: str) -> None:
    write_images(tmp_path, 1, size=(16, 16))
    Image.new(mode, (16, 16)).save(tmp_path / ("odd.png" if mode != "CMYK" else "odd.jpg"))
    data = ready(tmp_path, val_fraction=0.5, batch_size=1)
    images = data.val_dataloader().dataset
    images.samples = images.samples._replace(paths=np.array([str(next(tmp_path.glob("odd.*"))).encode()]))
    assert images.decode(0).shape == (3, 16, 16)


def test_jpegs_are_read_as_pillow_reads_them(tmp_path: Path) -> None:
    write_images(tmp_path, 1, size=(16, 20))
    upright, turned, lazy = tmp_path / "0000.jpg", tmp_path / "turned.jpg", tmp_path / "lazy.jpg"
    assert torch.equal(read_image(str(upright)), pil_to_tensor(Image.open(upright)))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned to the right
    Image.open(upright).save(turned, exif=exif, quality=95)
    assert read_image(str(turned)).shape == (3, 20, 16)
    torch.testing.assert_close(read_image(str(turned)).rot90(1, (1, 2)), pil_to_tensor(Image.open(turned)))
    lazy.write_bytes(upright.read_bytes()[:-2] + b"\0\0\xff\xd9")  # something before the end that does not belong there
    assert torch.equal(read_image(str(lazy)), read_image(str(upright)))


def test_clear_errors_about_folders(tmp_path: Path, image_root: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        ready(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        ready(tmp_path / "empty")
    write_images(tmp_path / "hole" / "full", 2)
    (tmp_path / "hole" / "void").mkdir()
    with pytest.raises(ValueError, match=r"hole/void holds no image: fill it or remove it"):
        ready(tmp_path / "hole")
    for split, names in (("train", "ab"), ("val", "ac")):
        for name in names:
            write_images(tmp_path / "differ" / split / name, 1)
    with pytest.raises(ValueError, match=r"has not the classes of the training folder: b, c"):
        ready(tmp_path / "differ")
    with pytest.raises(ValueError, match="24 training samples do not fill one batch of batch_size=25"):
        ready(image_root, batch_size=25).train_dataloader()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "data.image_size=0"),
        ({"batch_size": 0}, "data.batch_size=0"),
        ({"val_fraction": 1.0}, "data.val_fraction=1.0"),
        ({"fraction": 0.0}, "data.fraction=0.0"),
        ({"crop_scale": (0.5, 0.3)}, "data.crop_scale="),
        ({"flip": 1.5}, "data.flip=1.5"),
        ({"num_workers": -1}, "data.num_workers=-1"),
    ],
)
def test_impossible_numbers_are_refused(image_root: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_images(image_root, **arguments)
