"""Colors and places as scalars: each scalar does what its unit says, and what is drawn comes from its range."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from datamodules.views import (
    COLORS,
    DESTRUCTIVE,
    GEOMETRY,
    GRID,
    JITTER,
    Place,
    ViewMaker,
    Views,
    action_to,
    blur_kernel,
    draw_jitter,
    look,
    move,
    on_grid,
    recolor,
    relative_place,
)

PROPERTY = settings(deadline=None, derandomize=True, max_examples=200)
PLACES = st.builds(Place, st.integers(0, 200), st.integers(0, 200), st.integers(1, 300), st.integers(1, 300), st.booleans())
NEVER = {f"{name}_probability": 0.0 for name in ("jitter", *DESTRUCTIVE)}
ALWAYS = dict.fromkeys(NEVER, 1.0)


def image(height: int = 20, width: int = 24) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def maker(
    size: tuple[int, int] = (16, 12), scale: tuple[float, float] = (0.3, 1.0), flip: float = 0.5, **views
) -> ViewMaker:
    return ViewMaker(Views(**views), size, scale, flip)


def test_units_and_their_order_are_what_models_were_trained_with() -> None:
    assert list(COLORS.items()) == [
        ("brightness", 0.4), ("contrast", 0.4), ("saturation", 0.2), ("hue", 0.1),
        ("grayscale", 1.0), ("blur", 2.0), ("solarize", 1.0),
    ]  # fmt: skip
    assert GEOMETRY == ("down", "right", "taller", "wider", "mirrored")
    assert JITTER == {"default": (0.4, 0.4, 0.2, 0.1), "strong": (0.8, 0.8, 0.8, 0.2)}
    assert Views().action_names == tuple(COLORS) and Views(geometric=True).action_names == (*COLORS, *GEOMETRY)
    plain = Views()
    assert (plain.strength, plain.jitter, plain.jitter_probability) == ("default", None, 0.8)
    assert (plain.grayscale_probability, plain.blur_probability, plain.solarize_probability) == (0.2, 0.2, 0.2)
    assert (plain.blur_sigma, plain.source_from, plain.geometric) == ((0.1, 2.0), "shared", False)
    assert plain.ranges == JITTER["default"] and Views(strength="strong").ranges == JITTER["strong"]
    assert Views(strength="strong", jitter=(0.1, 0.2, 0.3, 0.4)).ranges == (0.1, 0.2, 0.3, 0.4)


@pytest.mark.parametrize("name", NEVER)
@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan])
def test_probabilities_out_of_their_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"data.views.{name}={value}: give a probability"):
        Views(**{name: value})
    assert getattr(Views(**{name: 0.0}), name) == 0 and getattr(Views(**{name: 1.0}), name) == 1


@pytest.mark.parametrize("place", range(4))
def test_each_range_of_the_jitter_is_checked(place: int) -> None:
    for value in (-0.01, 1.01 if place < 3 else 0.51):
        jitter = [0.1] * 4
        jitter[place] = value
        with pytest.raises(ValueError, match="brightness, contrast and saturation change by a factor"):
            Views(jitter=tuple(jitter))
    Views(jitter=(0.0, 0.0, 0.0, 0.0))
    Views(jitter=(1.0, 1.0, 1.0, 0.5))


def test_a_blur_of_one_strength_is_allowed_and_one_of_none_is_not() -> None:
    Views(blur_sigma=(1.0, 1.0))
    for sigma in ((0.0, 0.0), (-1.0, 1.0)):
        with pytest.raises(ValueError, match="data.views.blur_sigma"):
            Views(blur_sigma=sigma)


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        ({"brightness_factor": 1.4, "contrast_factor": 0.6, "saturation_factor": 1.2, "hue_factor": -0.1}, [1, -1, 1, -1]),
        (
            {"brightness_factor": 0.8, "contrast_factor": None, "saturation_factor": 0.5, "hue_factor": 0.25},
            [-0.5, 0, -2.5, 2.5],
        ),
        (
            {"brightness_factor": None, "contrast_factor": 1.1, "saturation_factor": None, "hue_factor": None},
            [0, 0.25, 0, 0],
        ),
    ],
)
def test_a_jitter_is_given_in_units(drawn: dict, expected: list[float]) -> None:
    sampler = SimpleNamespace(make_params=lambda inputs: drawn if inputs == [] else None)
    assert draw_jitter(sampler) == pytest.approx(expected)


def test_scalars_are_cut_to_the_grid_towards_zero() -> None:
    found = on_grid([1.5 * GRID, -1.5 * GRID, 0.9 * GRID, -0.9 * GRID, 1.0, -2.5])
    assert found.dtype == torch.float32 and GRID == 1 / 65536
    assert found.tolist() == [GRID, -GRID, 0.0, 0.0, 1.0, -2.5]
    assert on_grid([1 - 1e-12]).item() == 1 - GRID, "cut before it is rounded to float32"


@PROPERTY
@given(st.lists(st.floats(-8, 8), min_size=2, max_size=2))
def test_differences_of_scalars_lead_to_the_same_bits(scalars: list[float]) -> None:
    start, end = on_grid(scalars)
    assert start + (end - start) == end and abs(start.item() - scalars[0]) < GRID


def test_more_scalars_than_colors_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="shorter|longer"):
        recolor(image(), torch.zeros(12))  # an action with its geometry


def test_what_never_happens_does_not_at_the_lowest_random_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_: torch.tensor(0.0))
    assert not maker(flip=0.0).draw_place(image()).mirrored and maker(flip=1e-9).draw_place(image()).mirrored


def test_all_colors_are_applied_one_after_the_other() -> None:
    plain = image()
    scalars = torch.tensor([0.5, -0.75, 2.0, -1.5, 0.0, 0.6, 1.0])
    expected = vision.adjust_brightness(plain, 1 + 0.5 * 0.4)
    expected = vision.adjust_contrast(expected, 1 - 0.75 * 0.4)
    expected = vision.adjust_saturation(expected, 1 + 2.0 * 0.2)
    expected = vision.adjust_hue(expected, -1.5 * 0.1)
    expected = vision.gaussian_blur(expected, [3, 3], [1.2, 1.2])
    expected = torch.where(expected >= 128, 255 - expected, expected)
    assert torch.equal(recolor(plain, scalars), expected)
    gray = recolor(plain, scalars + torch.eye(7)[4])
    assert (gray[0] == gray[1]).all() and (gray[0] == gray[2]).all()


@pytest.mark.parametrize(
    ("size", "kernel"),
    [
        ((16, 16), 3),
        ((32, 32), 3),
        ((39, 90), 3),
        ((40, 90), 5),
        ((90, 40), 5),
        ((60, 60), 7),
        ((96, 96), 9),
        ((224, 224), 23),
    ],
)
def test_the_kernel_of_a_blur_is_odd_and_a_tenth_of_the_lesser_side(size: tuple[int, int], kernel: int) -> None:
    assert blur_kernel(torch.zeros(3, *size)) == kernel


def test_a_blur_has_the_kernel_of_the_image() -> None:
    plain = image(60, 80)
    assert torch.equal(recolor(plain, 0.5 * torch.eye(7)[5]), vision.gaussian_blur(plain, [7, 7], [1.0, 1.0]))


def test_looking_cuts_resizes_and_mirrors() -> None:
    plain = image()
    cut = plain[:, 2:10, 5:17]
    assert Place(2, 5, 8, 12).mirrored is False
    assert torch.equal(look(plain, Place(2, 5, 8, 12), (8, 12)), cut)
    assert torch.equal(look(plain, Place(2, 5, 8, 12, True), (8, 12)), cut.flip(-1))
    assert torch.equal(look(plain, Place(2, 5, 8, 12), (6, 9)), vision.resize(cut, [6, 9]))


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (Place(10, 20, 100, 200), [0, 0, 0, 0, 0]),
        (Place(60, 20, 100, 200), [0.5, 0, 0, 0, 0]),  # half its height further down
        (Place(10, 70, 100, 200), [0, 0.25, 0, 0, 0]),
        (Place(10, 20, 400, 200), [1.5, 0, 2, 0, 0]),  # the same corner, four times as tall
        (Place(10, 20, 100, 50), [0, -0.375, 0, -2, 0]),
        (Place(10, 20, 100, 200, True), [0, 0, 0, 0, 1]),
    ],
)
def test_a_place_relative_to_another(target: Place, expected: list[float]) -> None:
    source = Place(10, 20, 100, 200)
    assert relative_place(source, target) == pytest.approx(expected)
    mirrored = [expected[0], -expected[1], *expected[2:4], 1 - expected[4]]
    assert relative_place(source._replace(mirrored=True), target) == pytest.approx(mirrored)


@PROPERTY
@given(PLACES, PLACES)
def test_moving_by_what_lies_between_two_places_leads_from_one_to_the_other(source: Place, target: Place) -> None:
    assert move(source, relative_place(source, target)) == target
    assert relative_place(source, source) == [0.0] * 5


@PROPERTY
@given(st.lists(st.floats(-1.5, 1.5), min_size=3, max_size=3))
def test_the_way_back_from_a_color_undoes_its_factor(scalars: list[float]) -> None:
    colors = torch.tensor([*scalars, 0.7, 1.0, 0.5, 1.0])
    assert action_to(colors, Views()) is colors
    back = action_to(colors[None], Views(source_from="target"))[0]
    for place, unit in enumerate((0.4, 0.4, 0.2)):
        # The action is the target less the source: the source was darkened by 1 - unit * back.
        assert (1 + unit * colors[place]) * (1 - unit * back[place]) == pytest.approx(1, abs=1e-5)
    assert back[3:].tolist() == colors[3:].tolist()
    assert colors[:3].tolist() == pytest.approx(scalars, abs=1e-6), "what was given is left alone"


def test_places_come_from_the_crop_and_the_flip() -> None:
    whole = image(60, 80)
    torch.manual_seed(0)
    for scale in ((0.1, 0.1), (0.4, 0.5)):
        places = [maker(scale=scale, flip=0.3).draw_place(whole) for _ in range(300)]
        areas = torch.tensor([place.height * place.width / 4800 for place in places])
        assert scale[0] - 0.01 < areas.min() and areas.max() < scale[1] + 0.01
        assert all(0 <= p.top <= 60 - p.height and 0 <= p.left <= 80 - p.width for p in places)
        assert sum(p.mirrored for p in places) / 300 == pytest.approx(0.3, abs=0.08)
    assert not any(maker(flip=0.0).draw_place(whole).mirrored for _ in range(20))
    assert all(maker(flip=1.0).draw_place(whole).mirrored for _ in range(20))


@pytest.mark.parametrize("name", NEVER)
def test_each_probability_is_that_of_its_own_scalars(name: str) -> None:
    torch.manual_seed(0)
    drawn = torch.stack([maker(**(NEVER | {name: 0.4})).draw_colors(destructive=True) for _ in range(300)])
    colors = list(COLORS)
    mine = colors[:4] if name == "jitter_probability" else [name.removesuffix("_probability")]
    for place, color in enumerate(colors):
        share = (drawn[:, place] != 0).float().mean().item()
        assert share == (pytest.approx(0.4, abs=0.09) if color in mine else 0), color


def test_a_degraded_view_has_scalars_of_full_size_and_a_target_none() -> None:
    torch.manual_seed(0)
    degraded = torch.stack([maker(**ALWAYS, blur_sigma=(0.5, 1.5)).draw_colors(destructive=True) for _ in range(200)])
    assert (degraded[:, 4] == 1).all() and (degraded[:, 6] == 1).all()
    assert 0.25 - GRID <= degraded[:, 5].min() < 0.3 and 0.7 < degraded[:, 5].max() <= 0.75
    target = torch.stack([maker(**ALWAYS).draw_colors(destructive=False) for _ in range(50)])
    assert target.shape == (50, 7) and target[:, :4].any() and not target[:, 4:].any()


def test_coins_are_thrown_whatever_the_probability() -> None:
    """So that two settings differ in what they ask for alone."""
    after = []
    for settings_ in (NEVER, NEVER | {"grayscale_probability": 1.0, "solarize_probability": 1.0}):
        torch.manual_seed(0)
        maker(**settings_).draw_colors(destructive=True)
        after.append(torch.rand(()).item())
    assert after[0] == after[1]


@pytest.mark.parametrize("geometric", [False, True])
@pytest.mark.parametrize("source_from", ["shared", "target"])
def test_a_pair_is_what_its_scalars_say(geometric: bool, source_from: str) -> None:
    whole, size = image(60, 80), (16, 12)
    made = maker(size, geometric=geometric, source_from=source_from)
    for seed in range(30):
        torch.manual_seed(seed)
        target_place = made.draw_place(whole)
        source_place = made.draw_place(whole) if geometric else target_place
        colors, degraded = made.draw_colors(destructive=False), made.draw_colors(destructive=True)
        torch.manual_seed(seed)
        pair = made.pair(whole)
        assert torch.equal(pair.start, degraded)
        assert torch.equal(pair.target, recolor(look(whole, target_place, size), colors))
        seen = look(whole, source_place, size)
        if source_from == "shared":
            assert torch.equal(pair.source, recolor(seen, degraded)) and torch.equal(pair.action[:7], colors - degraded)
        else:
            assert torch.equal(pair.source, recolor(recolor(seen, colors), degraded)) and torch.equal(
                pair.action[:7], -degraded
            )
        geometry = relative_place(source_place, target_place) if geometric else []
        torch.testing.assert_close(pair.action[7:], torch.tensor(geometry))
        assert pair.action.dtype == torch.float32


def test_a_place_that_is_given_is_looked_at_unless_views_are_geometric() -> None:
    whole, place = image(60, 80), Place(3, 4, 16, 12, True)
    given_place = maker(**NEVER).pair(whole, place)
    assert torch.equal(given_place.target, whole[:, 3:19, 4:16].flip(-1)) and torch.equal(
        given_place.source, given_place.target
    )
    torch.manual_seed(0)
    first = maker(**NEVER, geometric=True).pair(whole, place)
    torch.manual_seed(0)
    second = maker(**NEVER, geometric=True).pair(whole)
    assert torch.equal(first.target, second.target) and torch.equal(first.source, second.source)
