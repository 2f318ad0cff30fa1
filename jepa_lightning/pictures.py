"""Figures and videos of what was reconstructed and forecast.

Shapes: N samples, T times, C channels (1 or 3), S image size. Pictures are in [0, 1].
"""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor

TITLES = {"jepa": "JEPA", "random_encoder": "random encoder", "pca": "PCA"}


def to_uint8(images: Tensor) -> np.ndarray:
    """(..., C, S, S) -> (..., S, S, 3) uint8."""
    rgb = images.detach().cpu().float().clamp(0, 1)
    rgb = rgb.expand(*rgb.shape[:-3], 3, *rgb.shape[-2:]).movedim(-3, -1)
    return (rgb * 255).round().to(torch.uint8).numpy()


def reconstruction_figure(frames: Tensor, decoded: dict[str, Tensor]) -> Figure:
    """A row of true frames, then a row per decoder.

    Args:
        frames: (N, C, S, S).
        decoded: Name of the encoder -> (N, C, S, S).
    """
    rows = {"truth": frames} | {TITLES.get(name, name): images for name, images in decoded.items()}
    figure = Figure(figsize=(1.3 * len(frames) + 1.2, 1.35 * len(rows)), dpi=100, layout="constrained")
    axes = figure.subplots(len(rows), len(frames), squeeze=False)
    for row, (title, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row, to_uint8(images), strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(title)
    return figure


def forecast_figure(errors: dict[str, Tensor], frame_seconds: float, threshold: float) -> Figure:
    """Position error over time, a line per forecaster.

    Args:
        errors: Name -> (T,) median relative error, 1 ... T frames ahead.
        frame_seconds: Time between frames.
        threshold: Drawn as the end of the valid prediction.
    """
    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    axis = figure.subplots()
    for name, error in errors.items():
        axis.plot(np.arange(1, len(error) + 1), error.cpu(), label=TITLES.get(name, name.replace("_", " ")))
    axis.axhline(threshold, color="grey", linestyle=":", label=f"valid below {threshold}")
    axis.set(xlabel=f"frames ahead ({frame_seconds} s each)", ylabel="position error / spread", ylim=(0, 1.6))
    axis.legend()
    return figure


def side_by_side(panels: dict[str, Tensor], first_frame: int = 0, zoom: int = 4) -> np.ndarray:
    """Video frames of several sequences next to each other, titled and numbered.

    Args:
        panels: Title -> (T, C, S, S).
        first_frame: Number of the first frame.
        zoom: Screen pixels per picture pixel.

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
    """Write (T, height, width, 3) uint8 frames as H.264."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=frames_per_second, options={"crf": "18"})
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, frames_per_second)
        for image in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def show_in_tensorboard(logger: Logger | None, tag: str, picture: Figure | np.ndarray, step: int = 0) -> None:
    """Add a figure, or a video (T, height, width, 3) in uint8, if the run logs to TensorBoard.

    The video goes in as an animated GIF, which is what TensorBoard's own `add_video` makes, with a package we need not.
    """
    if not isinstance(logger, TensorBoardLogger):
        return
    if isinstance(picture, Figure):
        logger.experiment.add_figure(tag, picture, step)
        return
    images = [Image.fromarray(frame) for frame in picture]
    buffer = io.BytesIO()
    images[0].save(buffer, format="GIF", save_all=True, append_images=images[1:], duration=100, loop=0)
    height, width = picture.shape[1:3]
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=buffer.getvalue())
    logger.experiment.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
