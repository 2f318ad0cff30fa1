"""Figures and videos: reconstructions and forecasts, masks, and what patch features look like.

Shapes: N samples, T times, C channels (1 or 3), S image size, H W pixels, P patches, D embedding dimension. Images are in
[0, 1].
"""

import io
import re
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from PIL import Image, ImageDraw
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.nn import functional

from datamodules.pixel_format import PixelFormat

TITLES = {"jepa": "JEPA", "random_encoder": "random encoder", "pca": "PCA"}

TITLE_POINTS = 10
"""Size of the titles of rows."""


def to_uint8(images: Tensor) -> np.ndarray:
    """(..., C, S, S) -> (..., S, S, 3) uint8."""
    rgb = images.detach().cpu().float().clamp(0, 1)
    rgb = rgb.expand(*rgb.shape[:-3], 3, *rgb.shape[-2:]).movedim(-3, -1)
    return (rgb * 255).round().to(torch.uint8).numpy()


def reconstruction_figure(frames: Tensor, decoded: dict[str, Tensor]) -> Figure:
    """A row of true frames, then a row per decoder.

    Args:
        frames: True frames, (N, C, S, S).
        decoded: Decoded frames: name of the encoder -> (N, C, S, S).
    """
    return rows_figure({"truth": frames} | {TITLES.get(name, name): images for name, images in decoded.items()})


def rows_figure(rows: dict[str, Tensor]) -> Figure:
    """Rows of images: title -> (N, C, H, W), as many and as large in each.

    They are one image, with the titles as ticks: axes of their own for each image would take seconds to lay out.
    """
    tiles = np.stack([to_uint8(images) for images in rows.values()])  # (rows, N, H, W, 3)
    height, width = tiles.shape[2:4]
    gap = max(1, max(height, width) // 16)
    tiles = np.pad(tiles, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
    image = np.concatenate([np.concatenate(list(row), axis=1) for row in tiles])[:-gap, :-gap]
    # Sizes in inches, and exact: an engine for layouts that does not know the image's aspect cuts titles off.
    inches = 1.3 * tiles.shape[1]
    margin = max(TextPath((0, 0), line, size=TITLE_POINTS).get_extents().width for row in rows for line in row.split("\n"))
    margin = margin / 72 + 0.15
    figure = Figure(figsize=(margin + inches, inches * image.shape[0] / image.shape[1]), dpi=100)
    axis = figure.add_axes((margin / (margin + inches), 0, inches / (margin + inches), 1))
    axis.imshow(image, interpolation="nearest")
    axis.set(xticks=[], yticks=[row * (height + gap) + (height - 1) / 2 for row in range(len(rows))], yticklabels=list(rows))
    axis.tick_params(length=0, labelsize=TITLE_POINTS)
    axis.spines[:].set_visible(False)
    return figure


def to_colors(images: Tensor, pixels: PixelFormat) -> Tensor:
    """Normalized images (N, C, H, W) in colors to look at, (N, 3, H, W) in [0, 1].

    Of other than 1 or 3 channels the first three are shown as red, green and blue; of two the second one is green and blue.
    """
    images = images.detach().float()
    mean, std = (images.new_tensor(values)[:, None, None] for values in (pixels.mean, pixels.std))
    shown = (images * std + mean).clamp(0, 1)
    if pixels.channels == 3:
        return shown
    first = torch.tensor([min(channel, pixels.channels - 1) for channel in range(3)], device=images.device)
    return shown[:, first]


def spread(values: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """One value or color per patch as an image: (N, P) or (N, P, C) -> (N, C, H, W)."""
    channels = values[..., None] if values.ndim == 2 else values
    small = channels.float().transpose(1, 2).unflatten(2, grid)  # (N, C, rows, columns)
    return functional.interpolate(small, size=size, mode="nearest")


def hide_patches(images: Tensor, hidden: Tensor, grid: tuple[int, int], gray: float = 0.6) -> Tensor:
    """Images (N, 3, H, W) with some patches in gray: `hidden` (N, P), bool."""
    mask = spread(hidden, grid, (images.shape[-2], images.shape[-1]))
    return images * (1 - mask) + gray * mask


def mark_blocks(images: Tensor, visible: Tensor, targets: Tensor, grid: tuple[int, int]) -> Tensor:
    """What a masked JEPA is asked: visible patches as they are, other target patches orange, all else dark.

    Args:
        images: Images, (N, 3, H, W).
        visible: Patches that the context encoder sees, (N, P), bool.
        targets: Patches to predict, (N, P), bool.
        grid: Number of patches per column and per row.
    """
    size = (images.shape[-2], images.shape[-1])
    seen, asked = spread(visible, grid, size), spread(targets & ~visible, grid, size)
    orange = images.new_tensor([1.0, 0.55, 0.1])[:, None, None]
    return images * (seen + 0.4 * asked + 0.15 * (1 - seen - asked).clamp(min=0)) + 0.6 * orange * asked


def feature_colors(features: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Three principal components of patch features as red, green and blue: (N, P, D) -> (N, 3, H, W).

    One projection for all images, so that similar patches of different images have similar colors.
    """
    flat = features.detach().float().flatten(0, 1)
    centered = flat - flat.mean(dim=0)
    with torch.autocast(features.device.type, enabled=False):  # no eigenvectors in bfloat16
        directions = torch.linalg.eigh(centered.T @ centered).eigenvectors[:, -3:].flip(1)  # (D, 3), largest first
        scores = centered @ directions
    low, high = (scores.quantile(q, dim=0) for q in (0.02, 0.98))
    colors = ((scores - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return spread(colors.unflatten(0, features.shape[:2]), grid, size)


def heat(images: Tensor, weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """Images (N, 3, H, W), each patch as bright as its weight (N, P) relative to the largest of its image."""
    relative = weights / weights.amax(dim=1, keepdim=True).clamp(min=1e-12)
    return images * (0.15 + 0.85 * spread(relative, grid, (images.shape[-2], images.shape[-1])))


def nearest_images(images: Tensor, features: Tensor, count: int) -> dict[str, Tensor]:
    """The most similar images of the same batch, as rows for `rows_figure`.

    Args:
        images: Images, (N, 3, H, W); the first `count` are the queries.
        features: Pooled embeddings of the images, (N, D).
        count: Number of queries; the number of neighbors shown is one less.
    """
    unit = functional.normalize(features.float() - features.float().mean(dim=0), dim=1)
    with torch.autocast(features.device.type, enabled=False):  # rounded, an image may not be the nearest to itself
        similar = unit[:count] @ unit.T
    order = similar.argsort(dim=1, descending=True)[:, : min(count, len(images))]  # itself first
    return {"query" if rank == 0 else f"nearest {rank}": images[order[:, rank]] for rank in range(order.shape[1])}


def forecast_figure(errors: dict[str, Tensor], frame_seconds: float, threshold: float) -> Figure:
    """Position error over time, a line per forecaster.

    Args:
        errors: Name of the forecaster -> median relative error 1 ... T frames ahead, (T,).
        frame_seconds: Time between frames in seconds.
        threshold: Error above which a forecast is no longer valid; drawn as a line.
    """
    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    axis = figure.subplots()
    for name, error in errors.items():
        axis.plot(np.arange(1, len(error) + 1), error.cpu(), label=TITLES.get(name, name.replace("_", " ")))
    axis.axhline(threshold, color="gray", linestyle=":", label=f"valid below {threshold}")
    axis.set(xlabel=f"frames ahead ({frame_seconds} s each)", ylabel="position error / spread", ylim=(0, 1.6))
    axis.legend()
    return figure


def steps_figure(errors: dict[str, Tensor], xlabel: str, ylabel: str) -> Figure:
    """Errors over the steps of a roll-out: a line per name -> (K,), 1 ... K steps ahead."""
    figure = Figure(figsize=(6, 4), dpi=100, layout="constrained")
    axis = figure.subplots()
    for name, error in errors.items():
        axis.plot(np.arange(1, len(error) + 1), error.cpu(), marker=".", label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    axis.legend()
    return figure


def side_by_side(panels: dict[str, Tensor], first_frame: int = 0, zoom: int = 4) -> np.ndarray:
    """Video frames of several sequences next to each other, titled and numbered.

    Args:
        panels: Title -> frames, (T, C, S, S).
        first_frame: Number of the first frame.
        zoom: Screen pixels per image pixel.

    Returns:
        (T, height, width, 3) uint8, with even sizes as H.264 wants them.
    """
    sequences = {title: to_uint8(images) for title, images in panels.items()}
    num_frames, size = next(iter(sequences.values())).shape[:2]
    cell, header, gap = size * zoom, 36, 8
    width = len(sequences) * cell + (len(sequences) - 1) * gap
    video = np.zeros((num_frames, header + cell + (header + cell) % 2, width + width % 2, 3), dtype=np.uint8)
    for time in range(num_frames):
        canvas = Image.fromarray(video[time])
        draw = ImageDraw.Draw(canvas)
        for column, (title, images) in enumerate(sequences.items()):
            left = column * (cell + gap)
            draw.text((left + 4, 4), title, fill=(255, 255, 255), font_size=13)
            canvas.paste(Image.fromarray(images[time]).resize((cell, cell), Image.Resampling.NEAREST), (left, header))
            draw.line([(left, header), (left + cell - 1, header)], fill=(70, 70, 70))
        draw.text((4, 19), f"frame {first_frame + time}", fill=(180, 180, 180), font_size=12)
        video[time] = np.asarray(canvas)
    return video


def write_video(path: str | Path, video: np.ndarray, frames_per_second: int) -> None:
    """Write (T, height, width, 3) uint8 frames as H.264, and as a GIF of the same name for where no mp4 is shown."""
    Path(path).with_suffix(".gif").write_bytes(_gif(video, 1000 // frames_per_second))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=frames_per_second, options={"crf": "18"})
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, frames_per_second)
        for image in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def wants_figures(trainer: Trainer) -> bool:
    """Whether figures of this process are looked at: those of the first, unless the run is a trial or one for speed."""
    return trainer.is_global_zero and not trainer.fast_dev_run and not trainer.barebones


def show(trainer: Trainer, tag: str, image: Figure | np.ndarray, step: int = 0) -> None:
    """Hand a figure or a video to every logger that shows images; if there is none, write it into the run directory.

    TensorBoard gets a figure as an image, and a video as an animated GIF, which is what its own `add_video` makes, with a
    package we need not. Any other logger gets them through its `log_image(key, images, step)` and
    `log_video(key, videos, step)`, as that of Weights & Biases has them. What no logger shows lies in
    default_root_dir/figures/TAG/step-00000000.png, or .gif (nowhere, if that is a URL). A disk that is full ends no
    training: there is one warning.

    Args:
        trainer: Trainer of the run; processes but the first show nothing.
        tag: Name of the figure.
        image: A figure, or a video (T, height, width, 3) in uint8.
        step: Optimizer step that the figure belongs to.
    """
    if not wants_figures(trainer):
        return
    folder = Path(trainer.default_root_dir) / "figures"
    try:
        given = [_give(logger, folder, tag, image, step) for logger in trainer.loggers]
        if not any(given) and "://" not in trainer.default_root_dir:
            _write(folder, tag, image, step)
    except OSError as error:
        if folder not in _UNWRITABLE:
            _UNWRITABLE.add(folder)
            warnings.warn(f"Figures cannot be written ({error}), and are left out from here on.", stacklevel=2)


_UNWRITABLE: set[Path] = set()
"""Folders that the warning was about."""


def _give(logger: Logger, folder: Path, tag: str, shown: Figure | np.ndarray, step: int) -> bool:
    """Hand a figure or a video to a logger; False if it shows none."""
    if isinstance(logger, TensorBoardLogger):
        if isinstance(shown, Figure):
            logger.experiment.add_figure(tag, shown, step)
            return True
        height, width = shown.shape[1:3]
        summary = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=_encoded(shown))
        logger.experiment.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=summary)]), step)
        return True
    method = getattr(logger, "log_image" if isinstance(shown, Figure) else "log_video", None)
    if not callable(method):
        return False
    if isinstance(shown, Figure):
        method(tag, [Image.open(io.BytesIO(_encoded(shown)))], step=step)
    else:  # by its file, so that the logger need not encode it
        method(tag, [str(_write(folder, tag, shown, step))], step=step)
    return True


def _write(folder: Path, tag: str, shown: Figure | np.ndarray, step: int) -> Path:
    """Write a figure as PNG or a video as GIF into a folder of its tag, and return the file."""
    name = re.sub(r"[^\w.-]+", "-", tag).strip(".-") or "figure"
    path = folder / name / f"step-{step:08d}.{'png' if isinstance(shown, Figure) else 'gif'}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_encoded(shown))
    return path


def _encoded(shown: Figure | np.ndarray) -> bytes:
    """A figure as the bytes of a PNG, a video as those of an animated GIF."""
    if not isinstance(shown, Figure):
        return _gif(shown, 100)
    buffer = io.BytesIO()
    shown.savefig(buffer, format="png")
    return buffer.getvalue()


def _gif(video: np.ndarray, milliseconds: int) -> bytes:
    """Frames as an animated GIF that shows each for so long."""
    buffer, images = io.BytesIO(), [Image.fromarray(frame) for frame in video]
    images[0].save(buffer, format="GIF", save_all=True, append_images=images[1:], duration=milliseconds, loop=0)
    return buffer.getvalue()
