"""Masks of any kind: properties that hold whatever the arguments are."""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_masks import overlap

from datamodules.rng import seeded_generator
from jepa_lightning.masks import MultiBlock, block_size

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)


def ranges(low: float, high: float) -> st.SearchStrategy[tuple[float, float]]:
    """Two numbers in order."""
    return st.tuples(*[st.floats(low, high)] * 2).map(lambda pair: (min(pair), max(pair)))


ARGUMENTS = st.fixed_dictionaries(
    {
        "grid": st.tuples(st.integers(2, 14), st.integers(2, 14)),
        "num_targets": st.integers(1, 6),
        "target_scale": ranges(0.02, 0.5),
        "target_aspect": ranges(0.3, 3.0),
        "context_scale": ranges(0.3, 1.0),
        "resampling_fraction": st.floats(0.0, 0.6),
        "margin": st.integers(0, 2),
        "official_compat": st.booleans(),
    }
)


def make(arguments: dict) -> MultiBlock:
    if arguments["official_compat"]:  # the released code leaves out the last row and column, and needs room for that
        assume(min(arguments["grid"]) >= 6 and arguments["target_scale"][1] <= 0.2 and arguments["num_targets"] <= 4)
        arguments = arguments | {"target_aspect": (0.75, 1.5), "context_scale": (0.85, 1.0), "margin": 0}
    try:
        return MultiBlock(**arguments)
    except ValueError:  # blocks as large as the grid, or with their margins
        assume(False)


@PROPERTY
@given(arguments=ARGUMENTS, batch_size=st.integers(1, 9), seed=st.integers(0, 99), progress=st.floats(0, 1))
def test_masks_of_any_kind_are_blocks_and_the_rest(arguments: dict, batch_size: int, seed: int, progress: float) -> None:
    masks = make(arguments)
    height, width = masks.grid
    drawn = masks.draw(batch_size, seeded_generator(seed), progress)
    assert drawn.context.shape[0] == batch_size and drawn.targets.shape[:2] == (batch_size, masks.num_targets)
    assert drawn.context.shape[1] >= 1 and drawn.targets.shape[2] >= 1
    assert overlap(drawn) == 0, "the context sees no target"
    for indices in drawn:
        assert indices.dtype == torch.int64 and 0 <= indices.min() and indices.max() < height * width
        assert (indices.diff(dim=-1) > 0).all(), "ascending, each patch once"
    blocks = drawn.targets.flatten(0, 1)
    rows, columns = blocks // width, blocks % width
    sides = [(places.amax(dim=1) - places.amin(dim=1) + 1) for places in (rows, columns)]
    assert (sides[0] * sides[1] == blocks.shape[1]).all(), "every block is a full rectangle"
    assert len(set(sides[0].tolist())) == 1, "of one shape in a batch"
    places = torch.stack([torch.arange(height * width) // width, torch.arange(height * width) % width], dim=1)
    apart = (places[drawn.context][:, :, None] - places[drawn.targets.flatten(1)][:, None]).abs().amax(dim=3)
    assert apart.min() > masks.margin, "the context keeps away from the targets"
    hidden = drawn.hidden(height * width)
    assert torch.equal(
        torch.cat([drawn.context, hidden], dim=1).sort(dim=1).values, torch.arange(height * width).expand(batch_size, -1)
    )
    assert (hidden.diff(dim=-1) > 0).all()


@PROPERTY
@given(arguments=ARGUMENTS, batch_sizes=st.tuples(*[st.integers(1, 40)] * 2), seed=st.integers(0, 99))
def test_how_many_patches_are_kept_and_predicted_depends_on_the_sizes_alone(arguments: dict, batch_sizes, seed: int) -> None:
    masks = make(arguments | {"official_compat": False})
    one, other = (
        masks.draw(batch_size, seeded_generator(seed, batch_size), size_generator=seeded_generator(seed))
        for batch_size in batch_sizes
    )
    assert one.context.shape[1] == other.context.shape[1] and one.targets.shape[2] == other.targets.shape[2]
    again = masks.draw(batch_sizes[0], seeded_generator(seed, batch_sizes[0]), size_generator=seeded_generator(seed))
    assert torch.equal(one.context, again.context) and torch.equal(one.targets, again.targets)


@PROPERTY
@given(grid=st.tuples(st.integers(1, 40), st.integers(1, 40)), scale=st.floats(0.01, 1.0), aspect=st.floats(0.2, 5.0))
def test_a_block_fits_and_keeps_its_area_where_it_can(grid: tuple[int, int], scale: float, aspect: float) -> None:
    height, width = block_size(grid, scale, aspect)
    assert 1 <= height <= grid[0] and 1 <= width <= grid[1]
    area = scale * grid[0] * grid[1]
    if width < grid[1]:
        assert abs(height * width - area) <= max(height / 2, height - area) + 1e-6, "but for whole patches"
