"""Draw a double pendulum with antialiasing, in pure tensor code on any device.

Each arm (rod and bob) is a signed distance field; a pixel is covered by `clamp(0.5 - distance, 0, 1)`, so a motion of a
hundredth of a pixel changes the picture. Drawing programs that truncate to whole pixels throw that away, and with it
the angular velocity: 1 pixel per frame is 1.4 rad/s at the first bob of a 64-pixel picture.

Shapes: F frames, C channels (1 grey, 3 RGB), S image size, K patch size.
"""

import math

import torch
from torch import Tensor

MARGIN = 1.1
"""Half of the picture's width, as a multiple of the stretched pendulum's length."""

ROD_RADIUS, BOB_RADIUS = 1 / 64, 2 / 64
"""As fractions of the picture's width, so that pictures of all sizes show the same pendulum."""

WHITE = (1.0,)
RGB = (((0.2, 0.8, 0.9), (0.95, 0.85, 0.2)), ((0.9, 0.3, 0.8), (0.95, 0.3, 0.2)))
"""Colours of rod and bob of the first arm, then of the second, in the order in which they are painted."""

CPU_CHUNK = 320
"""Frames drawn at a time on a CPU: more would leave its cache and take twice as long."""

MIN_IMAGE_SIZE = 16
"""Below this the rods are thinner than the antialiasing filter."""


def render(states: Tensor, image_size: int, lengths: tuple[float, float] = (1.0, 1.0), channels: int = 1) -> Tensor:
    """Draw one picture per state: light on black, pivot in the exact centre, y pointing up.

    On a CPU each arm is painted into a square just large enough for it, which costs a quarter of painting the whole
    picture; elsewhere the whole picture is painted at once. Both give the same pixels.

    Args:
        states: (..., 4); only the angles are read.
        image_size: S, height and width in pixels.
        lengths: Of the two rods, in metres.
        channels: 1 for grey, 3 for RGB.

    Returns:
        (..., C, S, S) in [0, 1], in the dtype of `states`.

    Raises:
        ValueError: `image_size` below 16 or `channels` not 1 or 3.
    """
    check_picture(image_size, channels)
    angles = states[..., :2].reshape(-1, 2)  # (F, 2)
    if states.device.type == "cpu":
        images = angles.new_zeros(len(angles), channels, image_size * image_size)
        for start in range(0, len(angles), CPU_CHUNK):
            chunk = slice(start, start + CPU_CHUNK)
            _paint(images[chunk], angles[chunk], image_size, lengths, whole=False)
    else:
        images = render_whole(angles, image_size, lengths, channels)
    return images.view(*states.shape[:-1], channels, image_size, image_size)


def render_whole(angles: Tensor, image_size: int, lengths: tuple[float, float], channels: int) -> Tensor:
    """The same pictures, every pixel computed: what accelerators do, and what the CPU's short cut is tested against.

    Args:
        angles: (F, 2) in radians.
        image_size: S, height and width in pixels.
        lengths: Of the two rods, in metres.
        channels: C, 1 for grey or 3 for RGB.

    Returns:
        (F, C, S * S).
    """
    images = angles.new_zeros(len(angles), channels, image_size * image_size)
    _paint(images, angles, image_size, lengths, whole=True)
    return images


def check_picture(image_size: int, channels: int) -> None:
    """Raise a ValueError for a picture that cannot be drawn."""
    if image_size < MIN_IMAGE_SIZE:
        raise ValueError(f"image_size={image_size}: the pendulum cannot be drawn below {MIN_IMAGE_SIZE} pixels.")
    if channels not in (1, 3):
        raise ValueError(f"channels={channels}: choose 1 (grey) or 3 (RGB).")


def _paint(images: Tensor, angles: Tensor, image_size: int, lengths: tuple[float, float], whole: bool) -> None:
    """Paint both arms into `images` (F, C, S * S), in place."""
    scale = image_size / (2 * MARGIN * sum(lengths))  # pixels per metre
    # Distance at which antialiasing ends: half a pixel outside.
    rod, bob = ROD_RADIUS * image_size + 0.5, BOB_RADIUS * image_size + 0.5
    grey = images.shape[1] == 1
    start = images.new_full((len(angles), 2), image_size / 2)  # the pivot, (x, y) with y pointing down
    for arm, length in enumerate(lengths):
        direction = torch.stack([torch.sin(angles[:, arm]), torch.cos(angles[:, arm])], dim=-1)  # (F, 2), a unit vector
        reach = length * scale
        end = start + reach * direction
        if whole:
            size, corner = image_size, torch.zeros_like(start)
        else:
            size = min(image_size, math.ceil(reach + rod + bob) + 1)
            corner = torch.minimum(start - rod, end - bob).floor().clamp(0, image_size - size)
        rod_distance, bob_distance = _distances(corner, size, start, direction, reach)
        rod_cover, bob_cover = (rod - rod_distance).flatten(1), (bob - bob_distance).flatten(1)  # (F, K * K)
        # White on black is the union of the shapes; in colour, each covers what was painted before.
        layers = (
            [(torch.maximum(rod_cover, bob_cover), WHITE)]
            if grey
            else list(zip((rod_cover, bob_cover), RGB[arm], strict=True))
        )
        if whole:
            canvas = images
        else:
            patch = _patch_indices(corner, size, image_size)[:, None].expand(-1, images.shape[1], -1)
            canvas = images.gather(-1, patch) if arm else images.new_zeros(patch.shape)  # nothing is below the first arm
        for cover, colour in layers:
            _blend(canvas, cover.clamp_(0, 1), colour)
        if not whole:
            images.scatter_(-1, patch, canvas)
        start = end


def _distances(corner: Tensor, size: int, start: Tensor, direction: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Distance in pixels of each pixel centre of a patch to the rod's axis and to the bob's centre.

    Along and across the rod are affine in x and y, so each is the outer sum of two vectors of length K.

    Returns:
        Two tensors (F, K, K), rows first.
    """
    centres = torch.arange(size, dtype=corner.dtype, device=corner.device) + 0.5
    offsets = corner[..., None] + centres - start[..., None]  # (F, 2, K), from the near end
    to_bob = (offsets - reach * direction[..., None]).square()
    bob_distance = (to_bob[:, 0, None, :] + to_bob[:, 1, :, None]).sqrt_()
    along_parts = offsets * direction[..., None]  # (F, 2, K)
    across_parts = offsets * direction.flip(-1)[..., None]
    along = along_parts[:, 0, None, :] + along_parts[:, 1, :, None]
    across = across_parts[:, 0, None, :] - across_parts[:, 1, :, None]
    beyond = along - along.clamp(0, reach)  # past either end of the rod
    rod_distance = across.square_().addcmul_(beyond, beyond).sqrt_()
    return rod_distance, bob_distance


def _patch_indices(corner: Tensor, size: int, image_size: int) -> Tensor:
    """Raster indices of the pixels of a K x K patch: (F, K * K), int64."""
    steps = torch.arange(size, device=corner.device)
    inside = (steps[:, None] * image_size + steps).flatten()
    x, y = corner.to(torch.int64).unbind(-1)
    return (y * image_size + x)[:, None] + inside


def _blend(canvas: Tensor, cover: Tensor, colour: tuple[float, ...]) -> None:
    """Paint `colour` over `canvas` (F, C, P) where `cover` (F, P) says so, in place."""
    if len(colour) == 1:
        torch.maximum(canvas[:, 0], cover, out=canvas[:, 0])  # grey: the union of the shapes
    else:
        for channel, value in enumerate(colour):
            canvas[:, channel].lerp_(torch.full_like(cover, value), cover)
