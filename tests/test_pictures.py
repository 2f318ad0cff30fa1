"""Figures and videos hold what they were given."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jepa_lightning.pictures import (
    forecast_figure,
    reconstruction_figure,
    show_in_tensorboard,
    side_by_side,
    to_uint8,
    write_video,
)
from jepa_lightning.probes.report import markdown_table


def test_video_has_the_frames_in_order(tmp_path: Path) -> None:
    panels = {name: torch.linspace(0, 1, 5).view(5, 1, 1, 1).expand(5, 1, 16, 16) for name in ("truth", "forecast")}
    video = side_by_side(panels, zoom=4)
    assert video.dtype == np.uint8 and video.shape[0] == 5 and video.shape[1] % 2 == video.shape[2] % 2 == 0
    write_video(tmp_path / "film.mp4", video, 10)
    with av.open(str(tmp_path / "film.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 5
    middle = [frame[-20, 20].mean() for frame in frames]
    assert middle == pytest.approx([0, 64, 128, 191, 255], abs=8)


def test_pictures_keep_their_values() -> None:
    assert to_uint8(torch.tensor([[[0.0, 0.5], [1.0, 2.0]]])).tolist() == [
        [[0] * 3, [128] * 3],
        [[255] * 3, [255] * 3],
    ]
    colour = torch.rand(2, 3, 4, 4)
    assert to_uint8(colour)[1, 2, 3, 0] == round(colour[1, 0, 2, 3].item() * 255)


def test_figures_have_a_row_per_decoder_and_a_line_per_forecaster() -> None:
    figure = reconstruction_figure(torch.rand(3, 1, 8, 8), {"jepa": torch.rand(3, 1, 8, 8)})
    assert len(figure.axes) == 6 and figure.axes[3].get_ylabel() == "JEPA"
    figure = forecast_figure({"jepa": torch.rand(5), "persistence": torch.rand(5)}, 0.05, 0.4)
    assert [line.get_label() for line in figure.axes[0].lines] == ["JEPA", "persistence", "valid below 0.4"]


def test_tensorboard_gets_figure_and_moving_picture(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    show_in_tensorboard(logger, "film", np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), dtype=np.uint8))
    show_in_tensorboard(logger, "curve", forecast_figure({"jepa": torch.rand(5)}, 0.05, 0.4))
    show_in_tensorboard(None, "nothing", np.zeros((1, 2, 2, 3), dtype=np.uint8))
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["images"]) == {"film", "curve"}
    assert events.Images("film")[0].encoded_image_string.startswith(b"GIF89a")


def test_table_shows_controls_beside_the_model_and_dashes_for_nothing() -> None:
    report = {
        "probe": {"linear_r2": {"omega1": 0.9}},
        "rollout": {"ratio_to_persistence": {"1": 0.123456}},
        "baselines": {
            "random_encoder": {"probe": {"linear_r2": {"omega1": 0.1}}, "rollout": {"ratio_to_persistence": {"1": 0.5}}},
            "persistence": {"rollout": {"ratio_to_persistence": {"1": 1.0}}},
        },
    }
    lines = markdown_table(report).splitlines()
    assert lines[0] == "| figure | JEPA | random encoder | persistence |"
    assert lines[2] == "| linear R2 of omega1 | 0.900 | 0.100 | - |"
    assert lines[3] == "| feature error / persistence, 1 frames ahead | 0.123 | 0.500 | 1.000 |"
