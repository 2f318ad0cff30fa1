"""Augmentations do what they are asked for, as often as they are asked to, and nothing else."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_images, write_images
from PIL import Image
from torch import Tensor

from datamodules import Views
from datamodules.image_datasets import TrainingImages

WHOLE = {"crop_scale": (1.0, 1.0), "image_size": 16}
"""Crops that are the whole of images of this size."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of the size that they are cut to."""
    root = tmp_path_factory.mktemp("square")
    write_images(root, 6, size=(16, 16))
    return root


def training(root: Path, **settings) -> TrainingImages:
    data = small_images(root, **(WHOLE | settings))
    data.setup("fit")
    return data.make_train_loader().loader.dataset


def drawn(data_set: TrainingImages, index: int, epochs: int) -> Tensor:
    """The same image in many epochs: (epochs, 3, 16, 16)."""
    return torch.cat([data_set.__getitems__([(epoch, index)]).images for epoch in range(epochs)])


def shares(images: Tensor, original: Tensor) -> tuple[float, float]:
    """Which parts are the image as it is, and its mirror image."""
    return tuple(
        (images == candidate).flatten(1).all(dim=1).float().mean().item() for candidate in (original, original.flip(-1))
    )


@pytest.mark.parametrize("flip", [0.0, 0.5, 0.8, 1.0])
def test_images_are_mirrored_as_often_as_asked(root: Path, flip: float) -> None:
    data_set = training(root, flip=flip)
    plain, mirrored = shares(drawn(data_set, 1, 300), data_set.decode(1))
    assert plain + mirrored == pytest.approx(1)
    assert mirrored == pytest.approx(flip, abs=0.0 if flip in (0, 1) else 0.1)


@pytest.mark.parametrize("geometric", [False, True])
def test_views_are_mirrored_as_often_as_asked(root: Path, geometric: bool) -> None:
    never = {f"{name}_probability": 0.0 for name in ("jitter", "grayscale", "blur", "solarize")}
    data_set = training(root, flip=0.5, views=Views(geometric=geometric, **never))
    batches = [data_set.__getitems__([(epoch, 1)]) for epoch in range(300)]
    views = [torch.cat([getattr(batch, name) for batch in batches]) for name in ("sources", "targets")]
    for images in views:
        plain, mirrored = shares(images, data_set.decode(1))
        assert plain + mirrored == pytest.approx(1) and mirrored == pytest.approx(0.5, abs=0.1)
    alike = (views[0] == views[1]).flatten(1).all(dim=1).float().mean().item()
    assert alike == pytest.approx(0.5 if geometric else 1.0, abs=0.1), "a flip for each view, or one for both"


def test_rand_augment_distorts_what_is_left_alone_without_it(root: Path) -> None:
    for augment, low, high in ((False, 1.0, 1.0), (True, 0.0, 0.5)):
        data_set = training(root, rand_augment=augment)
        assert low <= shares(drawn(data_set, 1, 60), data_set.decode(1))[0] <= high
    assert data_set.__getitems__([(0, 1)]).images.dtype == torch.uint8
    again = drawn(data_set, 1, 60)
    assert torch.equal(again, drawn(data_set, 1, 60)) and len(again.unique(dim=0)) > 20, "a function of epoch and index"


def test_crops_cover_the_area_asked_for(root: Path) -> None:
    """A step from dark to bright: how much of it a crop sees, over many crops, follows from the area."""
    folder = root.parent / "steps"
    folder.mkdir(exist_ok=True)
    for number in range(5):
        Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (64, 1, 3))).save(folder / f"{number}.png")
    for scale in ((0.09, 0.09), (0.3, 0.3), (0.09, 0.3)):
        images = drawn(training(folder, crop_scale=scale), 1, 200).float()
        widths = (images[:, 0].amax(dim=(1, 2)) - images[:, 0].amin(dim=(1, 2)) + 1) / 64  # of the crop, nearly
        # Width over height lies in 3/4 to 4/3, and what is resized loses a little at its edges.
        assert (widths > (0.75 * scale[0]) ** 0.5 - 0.1).all() and (widths < (4 / 3 * scale[1]) ** 0.5 + 0.05).all()
        assert widths.mean().item() == pytest.approx((scale[0] ** 0.5 + scale[1] ** 0.5) / 2, abs=0.06)
