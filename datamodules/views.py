"""Changes of an image that can be written down as an action: colors, and where the image is looked at.

Everything is described by scalars of which zero means "as it is". An action is the difference between the scalars of two
views, those of the target less those of the source, so that zero means "no change".

Shapes: A scalars, H W pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

COLORS = {
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "grayscale": 1.0,
    "blur": 2.0,
    "solarize": 1.0,
}
"""Scalars of a view's colors, in the order in which they are applied, and their units: a scalar of 1 means

* brightness, contrast: a factor of 1.4 (torchvision's `adjust_brightness`, `adjust_contrast`); -1 a factor of 0.6;
* saturation: a factor of 1.2;
* hue: a shift by a tenth of the color circle;
* grayscale: the colors are gone;
* blur: torchvision's `gaussian_blur` with a sigma of 2 pixels. As in BYOL, its kernel is a tenth of the image's side,
  which bounds the blur of small images: with the 3 pixels of a 32-pixel image, all sigmas above 1 look alike;
* solarize: values from 128 up are inverted.
"""

GEOMETRY = ("down", "right", "taller", "wider", "mirrored")
"""Scalars of a target's place relative to its source's, as seen in the source, for views with crops of their own:

* down, right: from the middle of the source to that of the target, in heights and widths of the source;
* taller, wider: log2 of the target's height and width over the source's;
* mirrored: 1 if one of the two is a mirror image and the other is not.
"""

JITTER = {"default": (0.4, 0.4, 0.2, 0.1), "strong": (0.8, 0.8, 0.8, 0.2)}
"""Maximum change of brightness, contrast, saturation and hue, as torchvision's ColorJitter has it. "default" is the
paper's; its strong variant is not public, ours is SimCLR's."""

SOLARIZE_THRESHOLD = 128.0

GRID = 2.0**-16
"""Scalars are multiples of it: then float32 adds and subtracts them exactly, and an action leads to the same bits."""

DESTRUCTIVE = ("grayscale", "blur", "solarize")


@dataclass(frozen=True)
class Views:
    """How pairs of views are made (Garrido et al. 2024): a target with other colors, a source that may be degraded too.

    >>> Views(strength="strong").action_names
    ('brightness', 'contrast', 'saturation', 'hue', 'grayscale', 'blur', 'solarize')

    Args:
        strength: Strength of the color jitter: maximum change of brightness, contrast, saturation and hue, (0.4, 0.4, 0.2,
            0.1) for "default" or (0.8, 0.8, 0.8, 0.2) for "strong".
        jitter: Maximum change of brightness, contrast, saturation and hue, instead of a named strength.
        jitter_probability: Probability of a color jitter, in each of the two views.
        grayscale_probability: Probability that a source has no colors.
        blur_probability: Probability that a source is blurred.
        solarize_probability: Probability that a source is solarized. The paper says 0.2 in one place and 0.1 in another.
        blur_sigma: Minimum and maximum standard deviation of the blur in pixels.
        source_from: What a source is made of. "shared": both views are made of one image, and the action is the
            difference. "target": the source is made of the target, and the action is the way back. (Readers of the paper
            disagree.)
        geometric: Whether each view has a crop and a flip of its own; the action then says how they differ, in five
            scalars more. This goes beyond the paper.
        recolored: Whether training batches also have what geometric sources show in the colors of their targets: I-JEPA
            then predicts its patches across a change of color.

    Raises:
        ValueError: A number out of its range, named together with what is allowed.
    """

    strength: Literal["default", "strong"] = "default"
    jitter: tuple[float, float, float, float] | None = None
    jitter_probability: float = 0.8
    grayscale_probability: float = 0.2
    blur_probability: float = 0.2
    solarize_probability: float = 0.2
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    source_from: Literal["shared", "target"] = "shared"
    geometric: bool = False
    recolored: bool = False

    def __post_init__(self) -> None:
        if self.recolored and not self.geometric:
            raise ValueError(
                "data.views.recolored=true without data.views.geometric: targets then show what sources show; leave it out."
            )
        if self.strength not in JITTER:
            raise ValueError(f"data.views.strength={self.strength!r}: choose one of {', '.join(JITTER)}.")
        if self.source_from not in ("shared", "target"):
            raise ValueError(f"data.views.source_from={self.source_from!r}: choose 'shared' or 'target'.")
        brightness, contrast, saturation, hue = self.ranges
        if not all(0 <= change <= 1 for change in (brightness, contrast, saturation)) or not 0 <= hue <= 0.5:
            raise ValueError(
                f"data.views.jitter={self.ranges}: brightness, contrast and saturation change by a factor of 1 - x to "
                "1 + x, x in [0, 1], and the hue by at most 0.5 of the color circle."
            )
        for name in ("jitter_probability", *(f"{name}_probability" for name in DESTRUCTIVE)):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.views.{name}={getattr(self, name)}: give a probability in [0, 1].")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"data.views.blur_sigma={self.blur_sigma}: give pixels, 0 < minimum <= maximum.")

    @property
    def ranges(self) -> tuple[float, float, float, float]:
        """Maximum change of brightness, contrast, saturation and hue."""
        return JITTER[self.strength] if self.jitter is None else self.jitter

    @property
    def color_changes(self) -> list[str]:
        """Names of the probabilities with which a view gets other colors: those of three channels, red, green and blue."""
        jitter = ["jitter"] if any(self.ranges) else []
        return [f"{name}_probability" for name in (*jitter, *DESTRUCTIVE) if getattr(self, f"{name}_probability")]

    @property
    def action_names(self) -> tuple[str, ...]:
        """The scalars of an action, in their order."""
        return (*COLORS, *(GEOMETRY if self.geometric else ()))


def action_to(colors: Tensor, views: Views) -> Tensor:
    """The action that makes versions of given colors out of a clean image, (..., 7).

    With `source_from: shared` these are the colors. With `target`, a model has learned the way back from what its source
    went through: to a version that is brighter by a factor f it leads from a source that was made darker by 1 / f. (Exact
    but for values cut off at black and white, and for the order of the steps.)
    """
    if views.source_from == "shared":
        return colors
    units = torch.tensor(list(COLORS.values())[:3])
    back = colors.clone()
    back[..., :3] = (1 - 1 / (1 + units * colors[..., :3])) / units
    return back


class Place(NamedTuple):
    """Where a view looks: a box of the image in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool = False


class Pair(NamedTuple):
    """Two views of an image, uint8 (C, H, W), and what leads from the one to the other."""

    source: Tensor
    target: Tensor
    action: Tensor
    """(A,), the scalars of the target less those of the source, in the order of `Views.action_names`."""

    start: Tensor
    """(7,), the colors of the source: `recolor(image, start + action)` is the target, bit for bit. With
    `source_from: target` they are relative to the target, and `recolor(target, -action)` is the source."""

    recolored: Tensor | None = None
    """uint8 (C, H, W): what the source shows in the colors of the target, if asked for."""


def draw_jitter(sampler: v2.ColorJitter) -> list[float]:
    """Brightness, contrast, saturation and hue of a jitter in units of `COLORS`, drawn from torch's global generator."""
    drawn = sampler.make_params([])
    factors = [drawn[f"{name}_factor"] for name in ("brightness", "contrast", "saturation")]  # None where nothing changes
    changes = [0.0 if factor is None else factor - 1 for factor in factors]
    return [
        change / unit for change, unit in zip([*changes, drawn["hue_factor"] or 0.0], list(COLORS.values())[:4], strict=True)
    ]


def on_grid(scalars: Sequence[float]) -> Tensor:
    """Scalars rounded towards zero to multiples of `GRID`: (A,), float32."""
    return (torch.tensor(scalars, dtype=torch.float64) / GRID).trunc().mul(GRID).float()


def recolor(image: Tensor, colors: Tensor) -> Tensor:
    """Apply scalars to an image, with torchvision's functions in a fixed order; whatever is zero is left out.

    Args:
        image: Image, uint8 (3, H, W).
        colors: Scalars (7,) in the units of `COLORS`, on the CPU.

    Returns:
        uint8 (3, H, W); the image itself if all scalars are zero.
    """
    changes = {name: scalar * unit for (name, unit), scalar in zip(COLORS.items(), colors.tolist(), strict=True)}
    if changes["brightness"]:
        image = vision.adjust_brightness(image, 1 + changes["brightness"])
    if changes["contrast"]:
        image = vision.adjust_contrast(image, 1 + changes["contrast"])
    if changes["saturation"]:
        image = vision.adjust_saturation(image, 1 + changes["saturation"])
    if changes["hue"]:
        image = vision.adjust_hue(image, changes["hue"])
    if changes["grayscale"]:
        image = vision.rgb_to_grayscale(image, num_output_channels=3)
    if changes["blur"]:
        image = vision.gaussian_blur(image, [blur_kernel(image)] * 2, [changes["blur"]] * 2)
    if changes["solarize"]:
        image = vision.solarize(image, SOLARIZE_THRESHOLD)
    return image


def blur_kernel(image: Tensor) -> int:
    """Odd side of the blur's kernel, a tenth of the image's shorter side as in BYOL, at least 3."""
    return max(3, min(image.shape[-2:]) // 20 * 2 + 1)


def look(image: Tensor, place: Place, size: tuple[int, int]) -> Tensor:
    """Cut a place out of an image: uint8 (C, any, any) -> (C, H, W)."""
    top, left, height, width, mirrored = place
    view = vision.resized_crop(image, top, left, height, width, list(size))
    return vision.horizontal_flip(view) if mirrored else view


def relative_place(source: Place, target: Place) -> list[float]:
    """The scalars of `GEOMETRY` that lead from one place to another."""
    down = (target.top + target.height / 2 - source.top - source.height / 2) / source.height
    right = (target.left + target.width / 2 - source.left - source.width / 2) / source.width
    return [
        down,
        -right if source.mirrored else right,
        math.log2(target.height / source.height),
        math.log2(target.width / source.width),
        float(source.mirrored != target.mirrored),
    ]


def move(source: Place, scalars: Sequence[float]) -> Place:
    """Where the scalars of `GEOMETRY` lead: the inverse of `relative_place`."""
    down, right, taller, wider, mirrored = scalars
    height, width = round(source.height * 2**taller), round(source.width * 2**wider)
    middle = (
        source.top + source.height * (0.5 + down),
        source.left + source.width * (0.5 + (-right if source.mirrored else right)),
    )
    top, left = round(middle[0] - height / 2), round(middle[1] - width / 2)
    return Place(top, left, height, width, source.mirrored != bool(mirrored))


class ViewMaker:
    """Make pairs of views; all randomness comes from torch's global generator, through torchvision's own samplers.

    Args:
        views: Settings of the views.
        size: Height H and width W in pixels.
        crop_scale: Minimum and maximum area of a crop, as fractions of the image.
        flip: Probability of a horizontal flip.
    """

    def __init__(self, views: Views, size: tuple[int, int], crop_scale: tuple[float, float], flip: float) -> None:
        self.views, self.size, self.flip = views, size, flip
        # Of these two only the samplers are used: the jitter's steps come in a random order, ours in a fixed one.
        self.jitter, self.blur = v2.ColorJitter(*views.ranges), v2.GaussianBlur(3, views.blur_sigma)
        self.crop = v2.RandomResizedCrop(size, scale=crop_scale)

    def draw_place(self, image: Tensor) -> Place:
        """A random place of an image (C, any, any)."""
        drawn: dict[str, Any] = self.crop.make_params([image])
        return Place(drawn["top"], drawn["left"], drawn["height"], drawn["width"], _happens(self.flip))

    def draw_colors(self, destructive: bool) -> Tensor:
        """Random colors of a view, (7,): those of a source may degrade it."""
        views = self.views
        scalars = draw_jitter(self.jitter) if _happens(views.jitter_probability) else [0.0] * 4
        if destructive:
            grayscale, solarize = _happens(views.grayscale_probability), _happens(views.solarize_probability)
            blurred = _happens(views.blur_probability)
            sigma = self.blur.make_params([])["sigma"][0] if blurred else 0.0
            scalars += [float(grayscale), sigma / COLORS["blur"], float(solarize)]
        return on_grid(scalars + [0.0] * (len(COLORS) - len(scalars)))

    def pair(self, image: Tensor, place: Place | None = None) -> Pair:
        """Two views of an image.

        Args:
            image: Image, uint8 (C, any, any); with changes of color of 3 channels.
            place: Place at which both look, unless the views are geometric; drawn if left out.
        """
        target_place = self.draw_place(image) if place is None or self.views.geometric else place
        source_place = self.draw_place(image) if self.views.geometric else target_place
        plain = look(image, target_place, self.size)
        colors, degraded = self.draw_colors(destructive=False), self.draw_colors(destructive=True)
        target = recolor(plain, colors)
        if self.views.geometric:
            plain = look(image, source_place, self.size)
        if self.views.source_from == "shared":
            source, action = recolor(plain, degraded), colors - degraded
        else:
            base = recolor(plain, colors) if self.views.geometric else target
            source, action = recolor(base, degraded), -degraded
        if self.views.geometric:
            action = torch.cat([action, torch.tensor(relative_place(source_place, target_place))])
        return Pair(source, target, action, degraded, recolor(plain, colors) if self.views.recolored else None)


def _happens(probability: float) -> bool:
    """A coin of the global generator; it is thrown whatever the probability, so that later draws stay the same."""
    return torch.rand(()).item() < probability
