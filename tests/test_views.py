"""Pairs of views: an action says exactly what happened."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import small_images, write_images
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from datamodules import Views
from datamodules.views import COLORS, Pair, Place, ViewMaker, look, move, recolor, relative_place

SIZE = (16, 12)


def image(height: int = 20, width: int = 24) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def pairs(count: int = 200, **settings) -> list[Pair]:
    maker = ViewMaker(Views(**settings), SIZE, (0.3, 1.0), 0.5)
    torch.manual_seed(0)
    return [maker.pair(image(*SIZE), Place(0, 0, *SIZE)) for _ in range(count)]


@pytest.mark.parametrize("strength", ["default", "strong"])
def test_the_action_leads_to_the_target_bit_for_bit(strength: str) -> None:
    for source, target, action, start, _ in pairs(strength=strength):
        assert torch.equal(recolor(image(*SIZE), start), source)
        assert torch.equal(recolor(image(*SIZE), start + action), target)


def test_the_action_leads_back_bit_for_bit_where_the_source_is_made_of_the_target() -> None:
    for source, target, action, *_ in pairs(source_from="target"):
        assert torch.equal(recolor(target, -action), source)


def test_no_action_is_no_change() -> None:
    plain = image()
    assert recolor(plain, torch.zeros(7)) is plain
    never = {f"{name}_probability": 0.0 for name in ("jitter", "grayscale", "blur", "solarize")}
    for source, target, action, *_ in pairs(5, **never):
        assert torch.equal(source, target) and not action.any()


def test_a_unit_is_what_its_docstring_says() -> None:
    plain = image()
    expected = {
        "brightness": vision.adjust_brightness(plain, 1.4),
        "contrast": vision.adjust_contrast(plain, 1.4),
        "saturation": vision.adjust_saturation(plain, 1.2),
        "hue": vision.adjust_hue(plain, 0.1),
        "grayscale": vision.rgb_to_grayscale(plain, 3),
        "blur": vision.gaussian_blur(plain, [3, 3], [2.0, 2.0]),
        "solarize": torch.where(plain >= 128, 255 - plain, plain),
    }
    assert list(expected) == list(COLORS)
    for number, name in enumerate(COLORS):
        assert torch.equal(recolor(plain, torch.eye(7)[number]), expected[name]), name
    assert torch.equal(recolor(plain, -torch.eye(7)[0]), vision.adjust_brightness(plain, 0.6))


def test_scalars_come_from_their_ranges_with_their_probabilities() -> None:
    drawn = pairs(2000)
    start = torch.stack([pair.start for pair in drawn])
    assert (start[:, :4].abs() <= 1).all() and (start[:, :4].abs().amax(0) > 0.97).all()
    assert (start[:, 0] != 0).float().mean().item() == pytest.approx(0.8, abs=0.03)
    for number in (4, 5, 6):
        assert (start[:, number] != 0).float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert start[:, 5].max() <= 1 and start[:, 5][start[:, 5] > 0].min() >= 0.049
    end = start + torch.stack([pair.action for pair in drawn])
    assert not end[:, 4:].any(), "a target is never degraded"
    assert (end[:, :4].abs() <= 1).all() and not torch.equal(end[:, :4], start[:, :4])
    correlation = torch.corrcoef(torch.stack([start[:, 0], end[:, 0]]))[0, 1]
    assert abs(correlation) < 0.08, "the two views are drawn apart"
    strong = torch.stack([pair.start for pair in pairs(500, jitter=(0.8, 0.0, 0.8, 0.5))])
    assert 1.9 < strong[:, 0].max() <= 2 and not strong[:, 1].any() and 3.9 < strong[:, 2].max() <= 4
    assert 4.8 < strong[:, 3].abs().max() <= 5


def test_geometric_actions_lead_from_place_to_place() -> None:
    maker = ViewMaker(Views(geometric=True), SIZE, (0.1, 1.0), 0.5)
    torch.manual_seed(0)
    whole = image(300, 400)
    for _ in range(300):
        source, target = maker.draw_place(whole), maker.draw_place(whole)
        scalars = torch.tensor(relative_place(source, target)).tolist()  # as float32 keeps them
        assert move(source, scalars) == target
    source, target = Place(10, 20, 100, 200), Place(60, 120, 200, 100, True)
    assert relative_place(source, target) == [1.0, 0.25, 1.0, -1.0, 1.0]
    assert relative_place(source._replace(mirrored=True), target) == [1.0, -0.25, 1.0, -1.0, 0.0]
    assert relative_place(source, source) == [0.0] * 5
    pair = maker.pair(whole)
    assert pair.action.shape == (12,) and not torch.equal(pair.source, pair.target)


def test_geometric_views_look_where_they_say() -> None:
    never = {f"{name}_probability": 0.0 for name in ("jitter", "grayscale", "blur", "solarize")}
    maker = ViewMaker(Views(geometric=True, **never), SIZE, (0.3, 1.0), 0.5)
    whole = image(60, 80)
    torch.manual_seed(1)
    target_place, source_place = maker.draw_place(whole), maker.draw_place(whole)
    torch.manual_seed(1)
    pair = maker.pair(whole)
    assert torch.equal(pair.source, look(whole, source_place, SIZE))
    assert torch.equal(pair.target, look(whole, move(source_place, pair.action[7:].tolist()), SIZE))
    assert move(source_place, pair.action[7:].tolist()) == target_place


def test_batches_of_views(image_root: Path) -> None:
    data = small_images(image_root, views=Views())
    data.setup("fit")
    loader = data.train_dataloader().loader
    batch = next(iter(loader))
    assert batch.sources.shape == batch.targets.shape == (4, 3, 16, 16) and batch.sources.dtype == torch.uint8
    assert batch.actions.shape == (4, 7) and batch.images is None and batch.key[:2] == (0, 0)
    again, other = (loader.dataset.__getitems__([(epoch, 5), (epoch, 6)]) for epoch in (0, 1))
    assert torch.equal(again.sources, loader.dataset.__getitems__([(0, 6), (0, 5)]).sources.flip(0))
    assert not torch.equal(again.sources, other.sources)
    done = data.on_after_batch_transfer(batch, 0)
    assert done.sources.dtype == done.targets.dtype == torch.float32 and done.images is None
    held_out = list(data.val_dataloader())
    assert sum(len(batch.labels) for batch in held_out) == 6
    plain = small_images(image_root)
    plain.setup("fit")
    assert torch.equal(held_out[0].images, next(iter(plain.val_dataloader())).images)
    assert torch.equal(held_out[0].sources, next(iter(data.val_dataloader())).sources), "the same at each validation"


def test_both_views_are_of_one_crop_unless_geometric(tmp_path: Path) -> None:
    write_images(tmp_path, 8, size=(40, 40))
    never = {f"{name}_probability": 0.0 for name in ("jitter", "grayscale", "blur", "solarize")}
    for geometric in (False, True):
        data = small_images(tmp_path, views=Views(geometric=geometric, **never), flip=0.5)
        data.setup("fit")
        for batch in (next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))):
            assert torch.equal(batch.sources, batch.targets) != geometric
            assert batch.actions.shape[1] == (12 if geometric else 7) and batch.actions.any() == geometric


def test_unreadable_images_are_left_out_of_views_too(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 4)
    write_images(tmp_path / "val", 3)
    for split in ("train", "val"):
        (tmp_path / split / "0001.jpg").write_bytes(b"no image")
    data = small_images(tmp_path, views=Views())
    data.setup("fit")
    with pytest.warns(UserWarning, match=r"0001.jpg cannot be decoded"):
        assert [len(batch.sources) for batch in data.train_dataloader()] == [4]
    with pytest.warns(UserWarning, match=r"0001.jpg cannot be decoded"):
        assert [len(batch.sources) for batch in data.val_dataloader()] == [2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": "weak"}, "data.views.strength='weak'"),
        ({"source_from": "both"}, "data.views.source_from='both'"),
        ({"recolored": True}, "data.views.recolored=true without data.views.geometric"),
        ({"jitter": (1.5, 0.4, 0.2, 0.1)}, "data.views.jitter="),
        ({"jitter": (0.4, 0.4, 0.2, 0.6)}, "data.views.jitter="),
        ({"jitter": (0.4, math.nan, 0.2, 0.1)}, "data.views.jitter="),
        ({"blur_probability": 1.2}, "data.views.blur_probability=1.2"),
        ({"blur_sigma": (0.0, 1.0)}, "data.views.blur_sigma="),
        ({"blur_sigma": (2.0, 1.0)}, "data.views.blur_sigma="),
    ],
)
def test_impossible_views_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Views(**settings)


def test_views_and_rand_augment_exclude_each_other(image_root: Path) -> None:
    with pytest.raises(ValueError, match="an action cannot say what RandAugment did"):
        small_images(image_root, views=Views(), rand_augment=True)


@pytest.mark.parametrize("name", ["jitter", "grayscale", "blur", "solarize"])
def test_views_say_what_changes_colors(name: str) -> None:
    none = {f"{kind}_probability": 0.0 for kind in ("jitter", "grayscale", "blur", "solarize")}
    assert not Views(**none).color_changes
    assert Views(**(none | {f"{name}_probability": 0.1})).color_changes == [f"{name}_probability"]
    assert not Views(**(none | {"jitter_probability": 0.1}), jitter=(0.0, 0.0, 0.0, 0.0)).color_changes


def test_what_the_source_shows_in_the_colors_of_the_target(image_root: Path) -> None:
    views = Views(geometric=True, recolored=True)
    maker, image = ViewMaker(views, (16, 16), (0.3, 1.0), 0.5), torch.randint(0, 256, (3, 20, 24), dtype=torch.uint8)
    for seed in range(5):
        torch.manual_seed(seed)
        pair = maker.pair(image)
        torch.manual_seed(seed)
        same = ViewMaker(replace(views, recolored=False), (16, 16), (0.3, 1.0), 0.5).pair(image)
        assert torch.equal(pair.source, same.source) and torch.equal(pair.target, same.target) and same.recolored is None
        torch.manual_seed(seed)
        _, place = maker.draw_place(image), maker.draw_place(image)  # the target's, the source's
        colors = pair.start + pair.action[:7]
        assert torch.equal(pair.recolored, recolor(look(image, place, (16, 16)), colors))
    data = small_images(image_root, views=views)
    data.setup("fit")
    batch, held_out = next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))
    assert batch.recolored.shape == batch.sources.shape and batch.recolored.dtype == torch.uint8
    assert not torch.equal(batch.recolored, batch.sources) and held_out.recolored is None


def test_a_run_of_before_does_not_go_on_with_other_samples(image_root: Path) -> None:
    for recolored in (False, True):
        data = small_images(image_root, views=Views(geometric=True, recolored=recolored))
        assert ("recolored" in data.augmentations()["views"]) == recolored
