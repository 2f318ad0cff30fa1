"""What data modules hand to modules: the contract between the two.

Shapes: B samples, T windows in time, A scalars of an action, C channels, S image size, H W pixels.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from datamodules.rng import seeded_generator


class ClipBatch(NamedTuple):
    """A batch of clips: what a world model in time learns from.

    A window is `history` consecutive frames, so that one observation can contain velocities; window t ends at the frame
    whose state is `states[:, t]`.
    """

    observations: Tensor
    """Pixels: (B, T, history * C, H, W) in [0, 1], oldest frame first. Vectors: (B, T, history * V); of the double pendulum
    x1, y1, x2, y2 in meters."""

    states: Tensor | None = None
    """(B, T, L): what is known of the newest frame, for probes and metrics only: no JEPA sees it in training. Of the double
    pendulum theta1, theta2 in radians (unwrapped), omega1, omega2 in radians per second."""

    actions: Tensor | None = None
    """(B, T - 1, A): action t, applied from the newest frame of window t until that of window t + 1, in [-1, 1]; of discrete
    actions one-hot vectors. None for what moves on its own."""

    vectors: Tensor | None = None
    """(B, T, history * V): vectors next to pixels (proprioception), for a model that observes both."""

    rewards: Tensor | None = None
    """(B, T - 1): reward from window t to window t + 1, for probes only."""

    episodes: Tensor | None = None
    """(B,), int64: number of a clip's episode in its split; None if each clip is all that is seen of its own."""


class ImageBatch(NamedTuple):
    """A batch of images."""

    images: Tensor
    """(B, C, H, W), normalized to the mean and standard deviation of ImageNet."""

    labels: Tensor
    """(B,), int64 class indices; -1 where there are none. For probes and metrics only."""

    key: tuple[int, ...]
    """Names this batch among all of the run: (seed, epoch, index of its first sample)."""


class ViewBatch(NamedTuple):
    """A batch of pairs of views: what IWM learns from, and I-JEPA if it predicts another view, too."""

    sources: Tensor
    """(B, C, H, W), normalized: the images of which the context encoder sees the visible patches."""

    targets: Tensor
    """(B, C, H, W), normalized: the images that the target encoder sees; the other view for I-JEPA."""

    actions: Tensor
    """(B, A): the actions that lead from source to target, scalar by scalar as in `datamodules.views`; 0 is no change."""

    images: Tensor | None
    """(B, C, H, W), normalized: the images as they are. None in training, where nobody looks at them."""

    labels: Tensor
    """(B,), int64 class indices; -1 where there are none. For probes and metrics only."""

    key: tuple[int, ...]
    """As in `ImageBatch`."""

    recolored: Tensor | None = None
    """(B, C, H, W), normalized: what the sources show, in the colors of the targets. In training alone, if asked for."""


VOID = -1
"""Class index of pixels that do not count."""


class SegmentationBatch(NamedTuple):
    """A batch of images and what each of their pixels shows: for the segmentation probe."""

    images: Tensor
    """(B, C, H, W), normalized."""

    masks: Tensor
    """(B, H, W), int64 class indices; `VOID` where nothing counts."""

    key: tuple[int, ...]
    """As in `ImageBatch`."""


WHOSE = {
    ClipBatch: "DoublePendulum or Trajectories",
    ImageBatch: "ImageFolder or SyntheticImages",
    SegmentationBatch: "SegmentationFolder",
    ViewBatch: "ImageFolder or SyntheticImages with data.views.strength=default",
}
"""Kind of batch -> the data modules that hand it out."""


def check_batches(reader: object, data: Any, *readable: type) -> None:
    """Compare what a model or probe reads with what a data module hands out, if that says so in its `batch_type`.

    Args:
        reader: Model or probe that reads the batches, named in the message.
        data: Data module that yields the batches, or None.
        readable: Types of batches that the reader takes.

    Raises:
        ValueError: The data module yields batches of another type.
    """
    theirs = getattr(data, "batch_type", None)
    if theirs is not None and theirs not in readable:
        raise ValueError(
            f"{type(reader).__name__} cannot read what {type(data).__name__} hands out ({theirs.__name__}): set data to "
            f"{' or '.join(WHOSE[kind] for kind in readable)}."
        )


IMAGE_NAMES = ("images", "image", "pixel_values", "pixels")
LABEL_NAMES = ("labels", "label")
OBSERVATION_NAMES = ("observations", "observation", "pixels")
ACTION_NAMES = ("actions", "action")
"""Names of what a batch may hold, where it is a dictionary; the first one that is there is taken."""


def _opened(batch: Any, names: tuple[str, ...], further: tuple[str, ...], shape: str) -> tuple[Tensor, Any]:
    """What a tensor, a pair or a dictionary holds: a tensor by one of its names, and what further names say, or None."""
    found: Any = batch
    second = None
    if isinstance(batch, dict):
        found, second = (next((batch[name] for name in known if name in batch), None) for known in (names, further))
    elif isinstance(batch, list | tuple) and batch:
        found, second = batch[0], batch[1] if len(batch) > 1 else None
    if not isinstance(found, Tensor):
        holds = f"the names {', '.join(map(str, batch))}" if isinstance(batch, dict) else f"a {type(found).__name__}"
        raise ValueError(
            f"A batch with {holds}: give {names[0]} {shape}, a pair ({names[0]}, {further[0]}), or a dictionary with "
            f"{' or '.join(map(repr, names))}."
        )
    return found, second


def as_image_batch(batch: Any, key: tuple[int, ...]) -> ImageBatch:
    """What other data sets hand out, as an `ImageBatch`: images, (images, labels, ...), or a dictionary of both.

    Args:
        batch: Images (B, 3, H, W), uint8 or normalized floats, and labels (B,), if there are any.
        key: Key of the batch, another one for each of the run.

    Raises:
        ValueError: There are no images in it.
    """
    images, labels = _opened(batch, IMAGE_NAMES, LABEL_NAMES, "(B, 3, H, W)")
    if not isinstance(labels, Tensor):
        labels = torch.full((len(images),), -1, device=images.device)
    elif labels.shape != (len(images),) or labels.is_floating_point():
        raise ValueError(
            f"Labels of shape {tuple(labels.shape)} and {labels.dtype} with {len(images)} images: give an integer for each, "
            "or no labels."
        )
    return ImageBatch(images, labels.long(), key)


def as_clip_batch(batch: Any) -> ClipBatch:
    """What other data sets hand out, as a `ClipBatch`.

    Args:
        batch: Windows (B, T, ...), a pair (windows, actions), or a dictionary of both, which may also have "states",
            "vectors" and "rewards". Pixels may be uint8. Actions are (B, T - 1, A), or (B, T, A), of which the last is left
            out.

    Raises:
        ValueError: There are no windows in it.
    """
    windows, actions = _opened(batch, OBSERVATION_NAMES, ACTION_NAMES, "of windows (B, T, ...)")
    states, vectors, rewards = (
        (batch.get(name) if isinstance(batch, dict) else None) for name in ("states", "vectors", "rewards")
    )
    steps = windows.shape[1] - 1
    if actions is not None and actions.shape[1] == steps + 1:
        actions = actions[:, :-1]  # an action for each window: the last one leads out of the batch
    if actions is not None and actions.shape[1] != steps:
        raise ValueError(f"{actions.shape[1]} actions with {steps + 1} windows: give one for each step between two windows.")
    return ClipBatch(as_pixels(windows), states, actions, vectors, rewards)


def as_pixels(windows: Tensor) -> Tensor:
    """Pixels in [0, 1]: uint8 is divided by 255, floats stay."""
    return windows.float() / 255 if windows.dtype == torch.uint8 else windows


def batch_generator(batch: ImageBatch | ViewBatch) -> torch.Generator:
    """Random numbers for a batch, on the CPU.

    They depend neither on workers nor on resumes, and differ between processes, whose batches start with other samples.
    """
    return seeded_generator(*batch.key)
