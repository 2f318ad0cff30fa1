"""Which patches a masked JEPA sees and which it must predict: multi-block masks (Assran et al. 2023, section 3).

Everything is drawn for a whole batch at once, as pure tensor code on the CPU, from a generator that the caller seeds.
Shapes: B batch, H W patches per column and row, N = H W patches, M target blocks, L patches of a block, K kept patches.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Range = tuple[float, float]

MAX_DRAWS = 20
"""How often `official_compat` resamples a batch of which some image has no context left."""

CALIBRATION_DRAWS = 1000
"""Images that are simulated to choose the number of context patches."""


class Masks(NamedTuple):
    """Raster indices of patches, int64, ascending within a row (but for an `IWM` that predicts visible patches, too)."""

    context: Tensor
    """(B, K), what the context encoder sees."""

    targets: Tensor
    """(B, M, L), what the predictor must predict."""

    def to(self, device: torch.device) -> "Masks":
        """The same masks on another device, without a wait for it: a GPU fetches them from page-locked memory."""
        if device.type == "cuda" and self.context.device.type == "cpu":
            return Masks(*(indices.pin_memory().to(device, non_blocking=True) for indices in self))
        return Masks(*(indices.to(device) for indices in self))

    def hidden(self, num_patches: int) -> Tensor:
        """All patches that the context encoder does not see: (B, N - K), ascending."""
        visible = torch.zeros(len(self.context), num_patches, dtype=torch.int8, device=self.context.device)
        visible.scatter_(1, self.context, 1)
        return visible.argsort(dim=1, stable=True)[:, : num_patches - self.context.shape[1]]


class MultiBlock:
    """Draw one large context block and several target blocks per image; the context loses what the targets cover.

    The size of the target block is drawn once per batch, so that all blocks stack; places are drawn per image, and
    every place at which a block fits is equally likely. How many context patches are left differs from image to
    image. Public implementations stack them by cutting all to the minimum of the batch, in raster order: the lower right
    of the image is then hardly ever seen, and the larger the batch, the smaller the context. Here the number kept, K,
    depends on the size of the blocks alone: it is the quantile `resampling_fraction` of the number left. Images with more
    keep a uniformly random subset; those with fewer take further patches from outside of the context block. Where all that
    lies outside of the targets is too little, target blocks overlap: the last ones move onto the first. To resample such
    images would make places at the corners rarer (by 8 % on 14 x 14 patches), since blocks far apart leave the fewest; but
    which block moves onto which does not depend on where they lie, so that each is as likely at every place as before.

    Args:
        grid: Number of patches per column and per row, (H, W).
        num_targets: Number of target blocks M per image; they may overlap.
        target_scale: Area of a target block, minimum and maximum fraction of the image.
        target_aspect: Height over width of a target block, minimum and maximum.
        context_scale: Area of the context block, minimum and maximum fraction of the image; it has the image's aspect.
        resampling_fraction: Fraction of images, in [0, 1), whose context block keeps fewer than K patches.
        more_target_scales: Further ranges of `target_scale`: each batch takes its blocks from one of all the ranges, each
            as likely.
        final_target_scale: `target_scale` at the end of training, for a linear curriculum; constant by default.
        official_compat: Draw as the released code of the paper does, with its flaws: for parity alone. Scale and aspect
            come from one random number, the last row and column are never used, and contexts are cut to the batch's
            minimum, first patches first.
        margin: Width in patches of a frame around each target block that the context does not see, so that a block cannot be
            read off its neighbors; 0 as in the paper.

    Raises:
        ValueError: A range or number that cannot be met on this grid, named together with what is allowed.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        num_targets: int = 4,
        target_scale: Range = (0.15, 0.2),
        target_aspect: Range = (0.75, 1.5),
        context_scale: Range = (0.85, 1.0),
        resampling_fraction: float = 0.1,
        final_target_scale: Range | None = None,
        more_target_scales: Sequence[Range] = (),
        official_compat: bool = False,
        margin: int = 0,
    ) -> None:
        height, width = grid
        if height < 1 or width < 1 or height * width < 4:
            raise ValueError(f"A grid of {height} x {width} patches is too small to hide a part: use 4 patches or more.")
        if num_targets < 1:
            raise ValueError(f"num_targets={num_targets}: give at least 1.")
        if not 0 <= resampling_fraction < 1:
            raise ValueError(f"resampling_fraction={resampling_fraction}: choose a fraction in [0, 1).")
        self.target_scales = (target_scale, target_scale if final_target_scale is None else final_target_scale)
        self.more_target_scales = [(low, high) for low, high in more_target_scales]
        largest = max(scale[1] for scale in (*self.target_scales, *self.more_target_scales))
        for name, (low, high) in (
            ("target_scale", target_scale),
            ("final_target_scale", self.target_scales[1]),
            *(("more_target_scales", scale) for scale in self.more_target_scales),
            ("context_scale", context_scale),
        ):
            if not 0 < low <= high <= 1:
                raise ValueError(
                    f"{name}=({low}, {high}): give the minimum and maximum fraction, 0 < minimum <= maximum <= 1."
                )
        if not 0 < target_aspect[0] <= target_aspect[1]:
            raise ValueError(f"target_aspect={target_aspect}: give the minimum and maximum ratio, 0 < minimum <= maximum.")
        self.grid, self.num_targets, self.target_aspect, self.context_scale = grid, num_targets, target_aspect, context_scale
        if margin < 0 or (margin and official_compat):
            raise ValueError(f"margin={margin}: give a number of patches >= 0; with official_compat=true there is none.")
        self.resampling_fraction, self.margin, self.official_compat = resampling_fraction, margin, official_compat
        self._kept: dict[tuple[int, int], int] = {}
        low, high = target_aspect
        for aspect in (low + part / 10 * (high - low) for part in range(11)):
            size = block_size(grid, largest, aspect)
            if size == grid:
                raise ValueError(
                    f"A target block of scale {largest} covers all of the {height} x {width} patches: lower the scale or "
                    "use smaller patches."
                )
        smallest = min(scale[0] for scale in (*self.target_scales, *self.more_target_scales))
        scales = [smallest + part / 20 * (largest - smallest) for part in range(21)]
        aspects = [low + part / 20 * (high - low) for part in range(21)]
        for size in {block_size(grid, scale, aspect) for scale in scales for aspect in aspects} if margin else ():
            self._check_margin(size)

    def _check_margin(self, size: tuple[int, int]) -> None:
        """Raise a ValueError if a block of this size and its margin leave no patch."""
        if self._least_left(size) < 1:
            raise ValueError(
                f"margin={self.margin} around a target block of {size[0]} x {size[1]} patches leaves no context on a grid "
                f"of {self.grid[0]} x {self.grid[1]}: lower the margin or the scale, or use smaller patches."
            )

    def _least_left(self, size: tuple[int, int]) -> int:
        """How many patches a block and its margin leave at least, wherever the block lies."""
        rows, columns = (min(extent, side + 2 * self.margin) for extent, side in zip(self.grid, size, strict=True))
        return self.grid[0] * self.grid[1] - rows * columns

    def draw(
        self,
        batch_size: int,
        generator: torch.Generator,
        progress: float = 0.0,
        size_generator: torch.Generator | None = None,
    ) -> Masks:
        """Masks of one batch.

        Args:
            batch_size: Number of images B.
            generator: Random generator on the CPU; the masks are a function of its state.
            progress: Fraction of the training that is done, in [0, 1], for the curriculum.
            size_generator: Draws the sizes of the blocks, hence K and L, instead of `generator`: processes that share its
                state get masks of one shape, as many tokens to work on, and features that can be gathered.
        """
        size_generator = size_generator or generator
        low, high = (a + progress * (b - a) for a, b in zip(*self.target_scales, strict=True))
        if self.more_target_scales:
            ranges = [(low, high), *self.more_target_scales]
            low, high = ranges[int(torch.randint(len(ranges), (), generator=size_generator))]
        if self.official_compat:
            return _draw_like_the_released_code(self, batch_size, generator, (low, high), size_generator)
        u, v, w = torch.rand(3, generator=size_generator).tolist()
        aspect = self.target_aspect[0] + v * (self.target_aspect[1] - self.target_aspect[0])
        size = block_size(self.grid, low + u * (high - low), aspect)
        smallest, largest = self.context_scale
        context_size = block_size(self.grid, smallest + w * (largest - smallest), self.grid[0] / self.grid[1])
        corners, block = self._place(batch_size, size, context_size, generator)
        kept = self._context_patches(size)
        covered = self._covered(corners, size, self.margin)
        for last in range(self.num_targets - 1, 0, -1):
            crowded = covered.shape[1] - covered.sum(dim=1) < kept
            if not crowded.any():
                break
            # To swap two blocks makes no image more or less crowded: so what moves, and what it moves onto, is as likely
            # at every place as what stays.
            corners[crowded, last] = corners[crowded, 0]
            covered[crowded] = self._covered(corners[crowded], size, self.margin)
        # The largest of random numbers are a uniformly random subset: of the context block first, then of the rest.
        lots = torch.rand(covered.shape, generator=generator) + block
        context = lots.masked_fill_(covered, -1).topk(kept, dim=1).indices.sort(dim=1).values
        return Masks(context, self._patches(corners, size))

    def _context_patches(self, size: tuple[int, int]) -> int:
        """K for a size of the target blocks: the same for all batches, whatever their size."""
        if size not in self._kept:
            self._check_margin(size)
            generator = torch.Generator().manual_seed(0)
            smallest, largest = self.context_scale
            counts = []
            for part in torch.linspace(0, 1, 10).tolist():
                context_size = block_size(self.grid, smallest + part * (largest - smallest), self.grid[0] / self.grid[1])
                corners, block = self._place(CALIBRATION_DRAWS // 10, size, context_size, generator)
                counts.append((block & ~self._covered(corners, size, self.margin)).sum(dim=1))
            quantile = int(torch.cat(counts).float().quantile(self.resampling_fraction))
            # Never more than what is left when all blocks lie on the first, wherever that is.
            self._kept[size] = max(1, min(quantile, self._least_left(size)))
        return self._kept[size]

    def _place(
        self, batch_size: int, size: tuple[int, int], context_size: tuple[int, int], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Random places: corners of the targets (B, M, 2), and which patches the context block has (B, N), bool."""
        corners = _corners(batch_size, self.num_targets, size, self.grid, generator)
        return corners, self._covered(_corners(batch_size, 1, context_size, self.grid, generator), context_size)

    def _covered(self, corners: Tensor, size: tuple[int, int], margin: int = 0) -> Tensor:
        """Which patches any of the blocks covers, with a margin around them: corners (B, M, 2) -> (B, N), bool."""
        inside = [
            (torch.arange(extent) >= corners[..., axis, None] - margin)
            & (torch.arange(extent) < corners[..., axis, None] + size[axis] + margin)
            for axis, extent in enumerate(self.grid)
        ]  # (B, M, H) and (B, M, W)
        # A sum over blocks of outer products: how many blocks cover each patch.
        return torch.einsum("bmh,bmw->bhw", inside[0].float(), inside[1].float()).flatten(1) > 0

    def _patches(self, corners: Tensor, size: tuple[int, int]) -> Tensor:
        """Raster indices of the patches of blocks: corners (B, M, 2) -> (B, M, L)."""
        rows, columns = torch.arange(size[0])[:, None], torch.arange(size[1])
        inside = (rows * self.grid[1] + columns).flatten()  # (L,)
        return (corners[..., 0] * self.grid[1] + corners[..., 1])[..., None] + inside


def block_size(grid: tuple[int, int], scale: float, aspect: float) -> tuple[int, int]:
    """Height and width in patches of a block that covers a fraction of the image, with a given height over width.

    The area counts first: a block too tall for the grid is wider instead, and one too wide is cut.
    """
    area = scale * grid[0] * grid[1]
    height = min(max(1, round(math.sqrt(area * aspect))), grid[0])
    width = min(max(1, round(area / height)), grid[1])  # from the rounded height, so that the area is kept
    return height, width


def _corners(batch: int, blocks: int, size: tuple[int, int], grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Upper left corners of blocks, uniform over all places at which they fit: (B, M, 2), int64."""
    axes = [torch.randint(0, g - s + 1, (batch, blocks), generator=generator) for g, s in zip(grid, size, strict=True)]
    return torch.stack(axes, dim=-1)


def _draw_like_the_released_code(
    masks: MultiBlock, batch_size: int, generator: torch.Generator, target_scale: Range, size_generator: torch.Generator
) -> Masks:
    """The distribution of facebookresearch/ijepa at 52c1ae9, for parity.

    Differs from it where it would not end: a context with no patch left is resampled, `MAX_DRAWS` times.

    Raises:
        RuntimeError: Some image of the batch had no context patch left each time.
    """
    height, width = masks.grid
    u, w = torch.rand(2, generator=size_generator).tolist()

    def size(scale: Range, aspect: Range, part: float) -> tuple[int, int]:
        area = int(height * width * (scale[0] + part * (scale[1] - scale[0])))
        ratio = aspect[0] + part * (aspect[1] - aspect[0])
        return min(round(math.sqrt(area * ratio)), height - 1), min(round(math.sqrt(area / ratio)), width - 1)

    target, context = size(target_scale, masks.target_aspect, u), size(masks.context_scale, (1.0, 1.0), w)
    smaller = (height - 1, width - 1)  # places at the far edges are left out
    for _ in range(MAX_DRAWS):
        corners = _corners(batch_size, masks.num_targets, target, smaller, generator)
        block = _corners(batch_size, 1, context, smaller, generator)
        free = masks._covered(block, context) & ~masks._covered(corners, target)
        kept = int(free.sum(dim=1).min())
        if kept:
            first = free.int().argsort(dim=1, descending=True, stable=True)[:, :kept]  # in raster order
            return Masks(first, masks._patches(corners, target))
    raise RuntimeError(f"No context is left outside of targets of {target} patches on a {height} x {width} grid.")
