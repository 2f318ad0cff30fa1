"""Multi-block masks: unbiased, of a size that the batch does not change, and never without an end."""

import itertools

import pytest
import torch

from datamodules.rng import seeded_generator
from jepa_lightning.masks import Masks, MultiBlock, block_size


def frequencies(masks: MultiBlock, batch_size: int, image_root: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each patch is context, and in a target: two (H, W)."""
    generator = seeded_generator(1)
    counts = torch.zeros(2, masks.grid[0] * masks.grid[1])
    for _ in range(image_root // batch_size):
        drawn = masks.draw(batch_size, generator)
        for row, indices in zip(counts, (drawn.context, drawn.targets), strict=True):
            row += torch.bincount(indices.flatten(), minlength=len(row))
    return tuple((counts / image_root).unflatten(1, masks.grid))


def overlap(masks: Masks) -> int:
    return int((masks.context[:, :, None] == masks.targets.flatten(1)[:, None]).sum())


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (6, 10)])
def test_every_patch_is_reached_and_no_side_is_preferred(grid: tuple[int, int]) -> None:
    images = 100_000
    for frequency in frequencies(MultiBlock(grid), 100, images):
        assert frequency.min() > 0.01
        for axis in (0, 1):
            difference = frequency - frequency.flip(axis)
            # Four target blocks share an image, so a patch's count varies by at most 4 times that of independent draws.
            error = (2 * 4 * frequency.clamp(max=1) / images).sqrt()
            assert (difference.abs() / error).max() < 4.5


def test_the_released_code_is_biased_and_so_is_its_copy() -> None:
    """The same test sees the flaw that it is there to see."""
    context, target = frequencies(MultiBlock((14, 14), official_compat=True), 128, 12_800)
    assert context[-1].max() == context[:, -1].max() == target[-1].max() == 0
    assert context[1].mean() > 5 * context[-3].mean()


@pytest.mark.parametrize(
    ("grid", "changes"),
    [
        ((14, 14), {}),
        ((8, 8), {}),
        ((6, 10), {"num_targets": 2}),
        ((14, 14), {"resampling_fraction": 0.6}),  # many images are crowded
        ((5, 5), {"num_targets": 6, "resampling_fraction": 0.9}),
    ],
)
def test_every_place_of_a_target_block_is_equally_likely(grid: tuple[int, int], changes: dict) -> None:
    """A chi-square test of the places of each block by itself: those of different images are independent."""
    masks, generator = MultiBlock(grid, target_scale=(0.18, 0.18), target_aspect=(1.0, 1.0), **changes), seeded_generator(8)
    size = block_size(grid, 0.18, 1.0)
    places = (grid[0] - size[0] + 1) * (grid[1] - size[1] + 1)
    counts = torch.zeros(masks.num_targets, grid[0] * grid[1], dtype=torch.float64)
    for _ in range(50):
        first = masks.draw(1000, generator).targets[:, :, 0]  # (B, M), the upper left patch of each block
        for block, row in zip(first.T, counts, strict=True):
            row += torch.bincount(block, minlength=len(row))
    assert ((counts > 0).sum(dim=1) == places).all()
    expected = 50_000 / places
    statistic = ((counts[counts > 0] - expected).square() / expected).view(masks.num_targets, -1).sum(dim=1)
    p_values = torch.special.gammaincc(torch.tensor((places - 1) / 2, dtype=torch.float64), statistic / 2)
    assert p_values.min() > 1e-3, p_values


def drawn_from(corners: list[list[tuple[int, int]]], block: torch.Tensor, kept: int, seed: int = 0) -> Masks:
    """Masks of blocks of 2 x 2 patches on a grid of 6 x 6, at corners (B, M) that are given, with a block of context."""
    masks = MultiBlock((6, 6), len(corners[0]), target_scale=(0.11, 0.11), target_aspect=(1.0, 1.0))
    masks._place = lambda *_: (torch.tensor(corners), block.flatten().expand(len(corners), -1))
    masks._context_patches = lambda size: kept
    return masks.draw(len(corners), seeded_generator(seed))


def test_blocks_give_way_from_the_last_on_and_no_more_than_they_must() -> None:
    apart, near = [(0, 0), (0, 4), (4, 0), (4, 4)], [(0, 0), (0, 0), (0, 2), (0, 2)]  # 16 and 8 patches are covered
    everywhere = torch.ones(6, 6, dtype=torch.bool)
    for kept, moved in ((20, 0), (21, 1), (24, 1), (25, 2), (28, 2), (29, 3), (32, 3)):
        drawn = drawn_from([apart, near], everywhere, kept)
        firsts = [[row * 6 + column for row, column in blocks] for blocks in (apart, near)]
        expected = [firsts[0][: 4 - moved] + [0] * moved, firsts[1] if kept <= 28 else [0] * 2 + [0, 0]]
        assert drawn.targets[:, :, 0].tolist() == expected, f"{kept} patches kept"
        assert drawn.context.shape == (2, kept) and overlap(drawn) == 0
        assert (drawn.targets[0, 0] == torch.tensor([0, 1, 6, 7])).all()


def test_context_is_of_its_block_and_only_what_it_lacks_comes_from_outside() -> None:
    block = torch.zeros(6, 6, dtype=torch.bool)
    block[:4] = True  # 24 patches, of which the target takes 4
    inside = block.flatten().nonzero().flatten()
    for seed in range(20):
        assert torch.isin(drawn_from([[(0, 0)]], block, 20, seed).context, inside).all()
        few, more = (drawn_from([[(0, 0)]], block, kept, seed).context for kept in (7, 26))
        assert few.shape == (1, 7) and torch.isin(few, inside).all()
        assert torch.isin(more, inside).sum() == 20 and more.shape == (1, 26)


def test_the_patches_kept_are_a_uniformly_random_subset() -> None:
    """In the block, and outside of it: each of 20 as often in 5, and each of 12 as often in 6."""
    block = torch.zeros(6, 6, dtype=torch.bool)
    block[:4] = True
    for kept, of, taken in ((5, 20, 5), (26, 12, 6)):
        context = drawn_from([[(0, 0)]] * 6000, block, kept).context
        counts = torch.bincount(context.flatten(), minlength=36).double()
        counts = counts[(counts > 0) & (counts < 6000)]
        assert len(counts) == of
        assert ((counts / 6000 - taken / of).abs() < 4.5 * (taken / of * (1 - taken / of) / 6000) ** 0.5).all()


def test_how_much_is_kept_is_the_quantile_of_what_is_left() -> None:
    """So large a fraction of images has fewer than K patches of its context block left."""
    for quantile in (0.1, 0.5):
        masks = MultiBlock((14, 14), target_scale=(0.18, 0.18), target_aspect=(1.0, 1.0), resampling_fraction=quantile)
        size, smallest, left = block_size((14, 14), 0.18, 1.0), 0.85, []
        for step in range(200):
            context_size = block_size((14, 14), smallest + (1 - smallest) * step / 199, 1.0)
            corners, block = masks._place(50, size, context_size, seeded_generator(9, step))
            left.append((block & ~masks._covered(corners, size)).sum(dim=1))
        share = (torch.cat(left) < masks.draw(1, seeded_generator(0)).context.shape[1]).double().mean()
        assert quantile - 0.06 < share < quantile + 0.06


@pytest.mark.parametrize("grid", [(14, 14), (8, 8)])
def test_context_size_does_not_depend_on_the_batch(grid: tuple[int, int]) -> None:
    sizes = {
        batch_size: [MultiBlock(grid).draw(batch_size, seeded_generator(2, step)).context.shape[1] for step in range(60)]
        for batch_size in (1, 8, 128)
    }
    assert sizes[1] == sizes[8] == sizes[128]
    assert sum(sizes[1]) / 60 > 0.28 * grid[0] * grid[1]


@pytest.mark.parametrize("official", [False, True])
def test_context_and_targets_are_sorted_distinct_and_never_meet(official: bool) -> None:
    masks, generator = MultiBlock((14, 14), official_compat=official), seeded_generator(3)
    for _ in range(50):
        drawn = masks.draw(16, generator)
        assert drawn.targets.shape[:2] == (16, 4)
        assert drawn.context.dtype == drawn.targets.dtype == torch.int64
        assert overlap(drawn) == 0
        for indices in drawn:
            assert (indices.diff(dim=-1) > 0).all()
            assert 0 <= indices.min() and indices.max() < 196


@pytest.mark.parametrize("grid", [*itertools.product(range(2, 9), repeat=2), (1, 4), (9, 1), (3, 40)])
@pytest.mark.parametrize("num_targets", [1, 4])
def test_every_grid_ends(grid: tuple[int, int], num_targets: int) -> None:
    masks, generator = MultiBlock(grid, num_targets), seeded_generator(4)
    for batch_size in (1, 33):
        drawn = masks.draw(batch_size, generator)
        assert drawn.context.shape[1] >= 1
        assert overlap(drawn) == 0


def test_context_is_there_even_if_targets_want_it_all() -> None:
    """Eight large blocks on a small grid leave nothing in most draws: the fall-back is used."""
    drawn = MultiBlock((4, 4), 8, target_scale=(0.5, 0.6), resampling_fraction=0.0).draw(64, seeded_generator(5))
    assert overlap(drawn) == 0
    assert drawn.context.shape[1] >= 1


def test_a_function_of_the_generator() -> None:
    masks = MultiBlock((14, 14))
    first, again, other = (masks.draw(4, seeded_generator(*key)) for key in ((0, 1, 2), (0, 1, 2), (0, 1, 3)))
    assert torch.equal(first.context, again.context) and torch.equal(first.targets, again.targets)
    assert not torch.equal(first.targets, other.targets)
    fresh = MultiBlock((14, 14)).draw(4, seeded_generator(0, 1, 2))  # whatever was drawn before
    assert torch.equal(first.context, fresh.context)


@pytest.mark.parametrize(
    ("grid", "scale", "aspect", "size"),
    [
        ((14, 14), 0.15, 1.0, (5, 6)),
        ((14, 14), 0.2, 1.5, (8, 5)),
        ((14, 14), 1.0, 1.0, (14, 14)),
        ((2, 2), 0.15, 0.75, (1, 1)),
        ((3, 40), 0.2, 1.0, (3, 8)),  # too tall for the grid
    ],
)
def test_block_sizes(grid: tuple[int, int], scale: float, aspect: float, size: tuple[int, int]) -> None:
    assert block_size(grid, scale, aspect) == size


def test_tall_and_large_are_drawn_apart() -> None:
    """In the released code one random number gives both, so that large blocks are always tall."""
    masks, generator = MultiBlock((32, 32)), seeded_generator(6)
    sizes = []
    for _ in range(400):
        block = masks.draw(1, generator).targets[0, 0]
        sizes.append((len(block), len(set((block // 32).tolist()))))
    area, height = torch.tensor(sizes, dtype=torch.float64).T
    aspect = height / (area / height)
    assert abs(torch.corrcoef(torch.stack([area, aspect]))[0, 1]) < 0.2


def test_several_scales_take_turns() -> None:
    masks = MultiBlock((14, 14), target_scale=(0.05, 0.06), more_target_scales=[(0.15, 0.2), (0.3, 0.35)])
    lengths = [masks.draw(1, seeded_generator(step)).targets.shape[2] for step in range(300)]
    shares = [sum(low < length < high for length in lengths) / 300 for low, high in ((5, 20), (20, 50), (50, 80))]
    assert sum(shares) == 1 and all(0.25 < share < 0.42 for share in shares)


def test_curriculum_moves_the_scale() -> None:
    masks = MultiBlock((14, 14), target_scale=(0.05, 0.05), final_target_scale=(0.3, 0.3))
    start, middle, end = (masks.draw(1, seeded_generator(7), progress).targets.shape[2] for progress in (0.0, 0.5, 1.0))
    assert start < 14 < middle < 50 < end


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (1, 1)}, "grid of 1 x 1"),
        ({"grid": (1, 3)}, "grid of 1 x 3"),
        ({"grid": (-2, -3)}, "grid of -2 x -3"),
        ({"grid": (5, 2), "target_scale": (0.9, 1.0), "target_aspect": (0.1, 2.05)}, "covers all of the 5 x 2 patches"),
        ({"num_targets": 0}, "num_targets=0"),
        ({"target_scale": (0.3, 0.2)}, "target_scale=\\(0.3, 0.2\\)"),
        ({"final_target_scale": (0.0, 0.2)}, "final_target_scale=\\(0.0"),
        ({"more_target_scales": [(0.2, 0.1)]}, "more_target_scales=\\(0.2, 0.1\\)"),
        ({"context_scale": (0.5, 1.5)}, "context_scale=\\(0.5, 1.5\\)"),
        ({"target_aspect": (0.0, 1.0)}, "target_aspect=\\(0.0"),
        ({"resampling_fraction": 1.0}, "resampling_fraction=1.0"),
        ({"margin": -1}, "margin=-1: give a number of patches >= 0"),
        ({"margin": 1, "official_compat": True}, "margin=1: .* with official_compat=true there is none"),
        ({"grid": (4, 4), "margin": 2}, "margin=2 around a target block of .* leaves no context on a grid of 4 x 4"),
        (
            {"grid": (8, 16), "margin": 4, "target_aspect": (0.5, 2.0)},
            "margin=4 around a target block of 3 x 8 patches leaves no context",  # a smaller block than the largest
        ),
        ({"grid": (2, 2), "target_scale": (0.9, 1.0)}, "covers all of the 2 x 2 patches"),
    ],
)
def test_impossible_masks_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiBlock(**({"grid": (14, 14)} | arguments))


def test_a_margin_takes_the_frame_and_no_more() -> None:
    corners = torch.tensor([[[0, 0], [4, 5]]])
    covered = MultiBlock((8, 8), margin=1)._covered(corners, (2, 2), 1).view(8, 8)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:3, :3] = expected[3:7, 4:8] = True
    assert torch.equal(covered, expected)
    with_margin, without = (MultiBlock((14, 14), margin=margin).draw(64, seeded_generator(1)) for margin in (1, 0))
    assert with_margin.context.shape[1] < without.context.shape[1] - 20


def test_the_context_block_is_one() -> None:
    masks = MultiBlock((14, 14))
    _, block = masks._place(50, (3, 3), (6, 4), seeded_generator(10))
    assert (block.sum(dim=1) == 24).all()


def test_the_released_sizes_come_from_the_generator_of_sizes() -> None:
    masks = MultiBlock((14, 14), official_compat=True)
    drawn = [masks.draw(2, seeded_generator(1), size_generator=seeded_generator(2)) for _ in range(9)]
    assert all(torch.equal(one.targets, drawn[0].targets) for one in drawn)
    assert (
        len({masks.draw(2, seeded_generator(1), size_generator=seeded_generator(seed)).targets.shape for seed in range(9)})
        > 1
    )


class Indices:
    """A tensor of indices as far as moving it is concerned: what was asked of it."""

    def __init__(self, device: str, asked: tuple = ()) -> None:
        self.device, self.asked = torch.device(device), asked

    def pin_memory(self) -> "Indices":
        return Indices("cpu", (*self.asked, "pinned"))

    def to(self, device: torch.device, non_blocking: bool = False) -> "Indices":
        return Indices(str(device), (*self.asked, "without a wait" if non_blocking else "moved"))


@pytest.mark.parametrize(
    ("start", "end", "asked"),
    [("cpu", "cuda:1", ("pinned", "without a wait")), ("cuda:1", "cuda:1", ("moved",)), ("cuda:0", "cpu", ("moved",))],
)
def test_a_gpu_fetches_masks_from_page_locked_memory(start: str, end: str, asked: tuple) -> None:
    moved = Masks(Indices(start), Indices(start)).to(torch.device(end))
    assert [(indices.device, indices.asked) for indices in moved] == [(torch.device(end), asked)] * 2
