"""Draw a double pendulum with antialiasing, in pure tensor code on any device.

Each arm (rod and bob) is a signed distance field; a pixel is covered by `clamp(0.5 - distance, 0, 1)`, so a motion of a
hundredth of a pixel changes the image. Drawing programs that truncate to whole pixels throw that away, and with it
the angular velocity: 1 pixel per frame is 1.4 rad/s at the first bob of a 64-pixel image.

Shapes: F frames, C channels (1 gray, 3 RGB), S image size, K patch size.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

MARGIN = 1.1
"""Half of the image's width, as a multiple of the stretched pendulum's length."""

ROD_RADIUS, BOB_RADIUS = 1 / 64, 2 / 64
"""As fractions of the image's width, so that images of all sizes show the same pendulum."""

RGB = (((0.2, 0.8, 0.9), (0.95, 0.85, 0.2)), ((0.9, 0.3, 0.8), (0.95, 0.3, 0.2)))
"""Colors of rod and bob of the first arm, then of the second, in the order in which they are drawn."""

CPU_CHUNK = 640 * 64**2
"""Pixels drawn at a time on a CPU: fewer would cost more in calls, more would leave its cache."""

MIN_IMAGE_SIZE = 16
"""Below this the rods are thinner than the antialiasing filter."""


def render(states: Tensor, image_size: int, lengths: tuple[float, float] = (1.0, 1.0), channels: int = 1) -> Tensor:
    """Draw one image per state: light on black, pivot in the exact center, y pointing up.

    On a CPU each arm is drawn into a square just large enough for it, which costs a quarter of drawing the whole
    image; elsewhere the whole image is drawn at once. Both give the same pixels.

    Args:
        states: States (..., 4); only the angles are read.
        image_size: Height and width S in pixels.
        lengths: Lengths of the two rods, in meters.
        channels: Number of channels C, 1 for gray or 3 for RGB.

    Returns:
        Images (..., C, S, S) in [0, 1], in the dtype of `states`.

    Raises:
        ValueError: `image_size` below 16 or `channels` not 1 or 3.
    """
    check_image(image_size, channels)
    angles = states[..., :2].reshape(-1, 2)  # (F, 2)
    if states.device.type == "cpu":
        images = angles.new_zeros(len(angles), channels, image_size * image_size)
        frames = max(1, CPU_CHUNK // image_size**2)
        for start in range(0, len(angles), frames):
            chunk = slice(start, start + frames)
            _draw_arms(images[chunk], angles[chunk], image_size, lengths, whole=False)
    else:
        images = render_whole(angles, image_size, lengths, channels)
    return images.view(*states.shape[:-1], channels, image_size, image_size)


def render_whole(angles: Tensor, image_size: int, lengths: tuple[float, float], channels: int) -> Tensor:
    """The same images, every pixel computed: what accelerators do, and what the CPU's short cut is tested against.

    Args:
        angles: Angles (F, 2) in radians.
        image_size: Height and width S in pixels.
        lengths: Lengths of the two rods, in meters.
        channels: Number of channels C, 1 for gray or 3 for RGB.

    Returns:
        Images (F, C, S * S).
    """
    images = angles.new_zeros(len(angles), channels, image_size * image_size)
    _draw_arms(images, angles, image_size, lengths, whole=True)
    return images


def check_image(image_size: int, channels: int) -> None:
    """Raise a ValueError for an image that cannot be drawn."""
    if image_size < MIN_IMAGE_SIZE:
        raise ValueError(f"image_size={image_size}: the pendulum cannot be drawn below {MIN_IMAGE_SIZE} pixels.")
    if channels not in (1, 3):
        raise ValueError(f"channels={channels}: choose 1 (gray) or 3 (RGB).")


def _draw_arms(images: Tensor, angles: Tensor, image_size: int, lengths: tuple[float, float], whole: bool) -> None:
    """Draw both arms into `images` (F, C, S * S), in place."""
    scale = image_size / (2 * MARGIN * sum(lengths))  # pixels per meter
    # Distance at which antialiasing ends: half a pixel outside.
    rod, bob = ROD_RADIUS * image_size + 0.5, BOB_RADIUS * image_size + 0.5
    channels = images.shape[1]
    start = images.new_full((len(angles), 2), image_size / 2)  # the pivot, (x, y) with y pointing down
    directions = torch.stack([angles.sin(), angles.cos()], dim=-1)  # (F, 2 arms, 2), unit vectors
    for arm, length in enumerate(lengths):
        reach = length * scale
        end = start + reach * directions[:, arm]
        if whole:
            size, corner = image_size, torch.zeros_like(start)
        else:
            size = min(image_size, math.ceil(reach + rod + bob) + 1)
            corner = torch.minimum(start - rod, end - bob).floor_().clamp_(0, image_size - size)
        to_rod, to_bob = _distances(corner, size, start, directions[:, arm], reach)  # (F, K * K)
        if whole:
            images.copy_(_over(images, to_rod, to_bob, rod, bob, arm, channels))
        else:
            patch = _patch_indices(corner, size, image_size)[:, None].expand(-1, channels, -1)
            below = images.gather(-1, patch) if arm else None  # nothing is below the first arm
            images.scatter_(-1, patch, _over(below, to_rod, to_bob, rod, bob, arm, channels))
        start = end


def _distances(corner: Tensor, size: int, start: Tensor, direction: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Distance in pixels of each pixel center of a patch to the rod's axis and to the bob's center.

    In coordinates along the rod, counted from its middle, and across it. Both are affine in x and y, so each is the outer
    sum of two vectors of length K.

    Returns:
        Two tensors (F, K * K), in raster order.
    """
    half = reach / 2
    centers = torch.arange(size, dtype=corner.dtype, device=corner.device) + 0.5
    offsets = corner[..., None] + centers - (start + half * direction)[..., None]  # (F, 2, K), from the rod's middle
    along_parts = offsets * direction[..., None]
    across_parts = offsets * direction.flip(-1)[..., None]
    along = (along_parts[:, 0, None, :] + along_parts[:, 1, :, None]).flatten(1)
    across_squared = (across_parts[:, 0, None, :] - across_parts[:, 1, :, None]).flatten(1).square_()
    beyond = functional.softshrink(along, half)  # past either end of the rod; 0 between them
    to_rod = across_squared.addcmul_(beyond, beyond).sqrt_()
    bob_parts = (offsets - half * direction[..., None]).square_()
    to_bob = (bob_parts[:, 0, None, :] + bob_parts[:, 1, :, None]).flatten(1).sqrt_()
    return to_rod, to_bob


def _patch_indices(corner: Tensor, size: int, image_size: int) -> Tensor:
    """Raster indices of the pixels of a K x K patch: (F, K * K), int64."""
    steps = torch.arange(size, device=corner.device)
    inside = (steps[:, None] * image_size + steps).flatten()
    x, y = corner.to(torch.int64).unbind(-1)
    return (y * image_size + x)[:, None] + inside


def _over(below: Tensor | None, to_rod: Tensor, to_bob: Tensor, rod: float, bob: float, arm: int, channels: int) -> Tensor:
    """Draw one arm over what is below it.

    Args:
        below: Pixels (F, C, P) below the arm, or None for black.
        to_rod: Distances (F, P) to the rod's axis in pixels.
        to_bob: Distances (F, P) to the bob's center in pixels; overwritten.
        rod: Distance from the rod's axis at which antialiasing ends, in pixels.
        bob: Distance from the bob's center at which antialiasing ends, in pixels.
        arm: Index of the arm, 0 or 1, which decides the colors.
        channels: Number of channels C.

    Returns:
        Pixels (F, C, P).
    """
    if channels == 1:  # white on black: the union of the shapes, with the bob shrunk to the rod's thickness for one pass
        cover = (rod - torch.minimum(to_rod, to_bob.sub_(bob - rod))).clamp_(0, 1)[:, None]
        return cover if below is None else torch.maximum(below, cover, out=cover)
    canvas = to_rod.new_zeros(len(to_rod), channels, to_rod.shape[1]) if below is None else below
    for distance, radius, color in ((to_rod, rod, RGB[arm][0]), (to_bob, bob, RGB[arm][1])):
        cover = (radius - distance).clamp_(0, 1)
        for channel, value in enumerate(color):
            canvas[:, channel].lerp_(torch.full_like(cover, value), cover)
    return canvas
