"""Figures and videos hold what they were given."""

from pathlib import Path

import av
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import small_data, small_model, trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jepa_lightning.embedding_figures import components_figure
from jepa_lightning.figures import (
    forecast_figure,
    reconstruction_figure,
    rows_figure,
    show,
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


def test_images_keep_their_values() -> None:
    assert to_uint8(torch.tensor([[[0.0, 0.5], [1.0, 2.0]]])).tolist() == [
        [[0] * 3, [128] * 3],
        [[255] * 3, [255] * 3],
    ]
    color = torch.rand(2, 3, 4, 4)
    assert to_uint8(color)[1, 2, 3, 0] == round(color[1, 0, 2, 3].item() * 255)


def test_rows_of_images_lie_next_to_each_other_and_under_their_titles() -> None:
    rows = {name: torch.rand(3, channels, 32, 16) for name, channels in (("truth", 3), ("gray", 1))}
    axis = rows_figure(rows).axes[0]
    image = axis.images[0].get_array()
    assert image.shape == (2 * 32 + 2, 3 * 16 + 2 * 2, 3)
    for row, (name, images) in enumerate(rows.items()):
        assert axis.get_yticks()[row] == row * 34 + 15.5
        for column in range(3):
            found = image[row * 34 : row * 34 + 32, column * 18 : column * 18 + 16]
            assert np.array_equal(found, to_uint8(images)[column]), (name, column)
    assert (image[32:34] == 255).all() and (image[:, 16:18] == 255).all()


@pytest.mark.parametrize("title", ["nearest", "saturation,\npredicted", "a"])
@pytest.mark.parametrize(
    ("count", "rows", "width"), [(9, 6, 32), (9, 2, 32), (9, 8, 32), (4, 8, 32), (2, 2, 32), (1, 1, 64)]
)
def test_titles_of_rows_are_not_cut_off(count: int, rows: int, width: int, title: str, tmp_path: Path) -> None:
    figure = rows_figure({f"{title} {number}": torch.rand(count, 3, 32, width) for number in range(rows)})
    figure.savefig(tmp_path / "rows.png")
    titles = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert len(titles) == rows and min(title.x0 for title in titles) >= 0
    image = figure.axes[0].get_window_extent()
    assert max(title.x1 for title in titles) <= image.x0 and image.x1 == pytest.approx(figure.bbox.x1)
    height, width = figure.axes[0].images[0].get_size()
    assert image.width / image.height == pytest.approx(width / height, rel=1e-3)


def test_figures_have_a_row_per_decoder_and_a_line_per_forecaster() -> None:
    figure = reconstruction_figure(torch.rand(3, 1, 8, 8), {"jepa": torch.rand(3, 1, 8, 8)})
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["truth", "JEPA"]
    figure = forecast_figure({"jepa": torch.rand(5), "persistence": torch.rand(5)}, 0.05, 0.4)
    assert [line.get_label() for line in figure.axes[0].lines] == ["JEPA", "persistence", "valid below 0.4"]


FILM = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), dtype=np.uint8)


def curve() -> Figure:
    return forecast_figure({"jepa": torch.rand(5)}, 0.05, 0.4)


def show_both(run: pl.Trainer) -> None:
    show(run, "forecast/film", FILM, 12)
    show(run, "a curve", curve(), 1234)


class Gallery(Logger):
    """A logger with the methods of Lightning's for Weights & Biases."""

    name = version = "gallery"

    def __init__(self) -> None:
        super().__init__()
        self.images, self.videos = [], []

    def log_metrics(self, metrics, step=None) -> None:
        pass

    def log_hyperparams(self, *args, **kwargs) -> None:
        pass

    def log_image(self, key: str, images: list, step: int | None = None) -> None:
        self.images.append((key, [image.size for image in images], step))

    def log_video(self, key: str, videos: list, step: int | None = None) -> None:
        self.videos.append((key, [Path(video).read_bytes()[:6] for video in videos], step))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_tensorboard_gets_figure_and_moving_image(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    show_both(trainer(tmp_path, logger=logger))
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["images"]) == {"forecast/film", "a curve"}
    film, figure = events.Images("forecast/film")[0], events.Images("a curve")[0]
    assert film.encoded_image_string.startswith(b"GIF89a") and film.step == 12
    assert (film.height, film.width) == (16, 16)
    assert figure.encoded_image_string.startswith(b"\x89PNG") and figure.step == 1234
    assert not (tmp_path / "figures").exists(), "nothing is shown twice"


def test_a_logger_that_takes_images_gets_them(tmp_path: Path) -> None:
    gallery = Gallery()
    show_both(trainer(tmp_path, logger=gallery))
    assert gallery.images == [("a curve", [(700, 400)], 1234)]
    assert gallery.videos == [("forecast/film", [b"GIF89a"], 12)]


def test_each_of_several_loggers_is_served(tmp_path: Path) -> None:
    tensorboard, gallery = TensorBoardLogger(tmp_path, name="", version=""), Gallery()
    show_both(trainer(tmp_path, logger=[CSVLogger(tmp_path), tensorboard, gallery]))
    tensorboard.experiment.flush()
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["images"] == ["forecast/film", "a curve"]
    assert len(gallery.images) == len(gallery.videos) == 1
    assert not (tmp_path / "figures" / "a-curve").exists()


@pytest.mark.parametrize("logger", ["csv", "none"])
def test_without_such_a_logger_there_are_files(tmp_path: Path, logger: str) -> None:
    run = trainer(tmp_path, logger=CSVLogger(tmp_path / "logs") if logger == "csv" else False)
    show_both(run)
    show(run, "../../no/way: out?", curve())
    found = files(tmp_path / "figures")
    assert set(found) == {
        "forecast-film/step-00000012.gif",
        "a-curve/step-00001234.png",
        "no-way-out/step-00000000.png",
    }
    with Image.open(tmp_path / "figures/forecast-film/step-00000012.gif") as film:
        assert film.n_frames == 4 and film.size == (16, 16) and film.info["duration"] == 100
    with Image.open(tmp_path / "figures/a-curve/step-00001234.png") as figure:
        assert figure.size == (700, 400)


def test_other_processes_and_trials_show_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show_both(trainer(tmp_path / "trial", fast_dev_run=True))
    show_both(
        trainer(
            tmp_path / "speed",
            barebones=True,
            enable_checkpointing=None,
            logger=None,
            enable_progress_bar=None,
            enable_model_summary=None,
            num_sanity_val_steps=None,
        )
    )
    second = trainer(tmp_path / "second")
    monkeypatch.setattr(type(second.strategy), "is_global_zero", False)
    show_both(second)
    assert not files(tmp_path)


def test_a_full_disk_is_one_warning(tmp_path: Path) -> None:
    (tmp_path / "figures").write_text("in the way")
    run = trainer(tmp_path)
    with pytest.warns(UserWarning, match="Figures cannot be written .*figures") as caught:
        show_both(run)
        show_both(run)
    assert len(caught) == 1


def test_table_shows_baselines_next_to_the_model_and_dashes_for_nothing() -> None:
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
    assert lines[3] == "| embedding error / persistence, 1 frames ahead | 0.123 | 0.500 | 1.000 |"


def test_embeddings_of_an_angle_are_a_curve_and_of_a_collapsed_encoder_a_dot(tmp_path: Path) -> None:
    angles = torch.linspace(-4, 4, 60).view(6, 10)
    circle = torch.stack([angles.cos(), angles.sin(), 0 * angles], dim=-1)
    (points,) = (artist for artist in components_figure(3 * circle, angles).axes[0].collections)
    found = torch.tensor(points.get_offsets().data)
    flat = 3 * circle.flatten(0, 1)
    flat = flat.double()
    distances = [(places[:, None] - places).norm(dim=-1) for places in (found.double(), flat)]
    torch.testing.assert_close(*distances, atol=1e-5, rtol=1e-5)
    assert points.get_array().max() <= torch.pi and points.get_array().min() >= -torch.pi
    dot = components_figure(1e-4 * circle, angles).axes[0]
    assert dot.get_xlim() == (-1, 1), "of the same scale, so that it looks like one"
    run = trainer(tmp_path, logger=TensorBoardLogger(tmp_path, name="", version=""), max_steps=6, limit_val_batches=1.0)
    run.fit(small_model(), small_data())
    events = EventAccumulator(str(tmp_path)).Reload()
    assert "embeddings by angle" in events.Tags()["images"]
    trainer(tmp_path / "alone", logger=False, max_steps=6, limit_val_batches=1.0).fit(small_model(), small_data())
    assert not (tmp_path / "alone" / "figures").exists(), "a run without a logger is left alone"
