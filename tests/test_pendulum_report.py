"""The report of a pendulum as a whole: three forecasters whose worth is known, each under its own name."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import small_data
from torch import Tensor, nn

from datamodules.physics import Pendulum, sample_initial_states, state_labels
from datamodules.rng import seeded_generator
from jepa_lightning.probes.dynamics import evaluation
from jepa_lightning.probes.dynamics.evaluation import (
    CHUNK,
    RATIO_STEPS,
    START,
    Scene,
    constant_velocity,
    evaluate,
    state_from_labels,
)

PENDULUM = Pendulum(masses=(1.3, 0.7), lengths=(0.8, 1.1), gravity=9.0)
WINDOWS = 50


@pytest.fixture(scope="module")
def states() -> Tensor:
    """True states of 5 trajectories, (5, 50, 4)."""
    return PENDULUM.simulate(sample_initial_states(5, seeded_generator(3)), WINDOWS, dtype=torch.float32)


def scene(states: Tensor) -> Scene:
    return Scene(PENDULUM, 16, states)


class Scaled(nn.Module):
    """A probe that multiplies."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, features: Tensor) -> Tensor:
        """(..., L) -> (..., L)."""
        return self.factor * features


class Painter:
    """A decoder of embeddings that are positions already, with an error added."""

    def __init__(self, error: float = 0.0) -> None:
        self.error, self.jepa = error, SimpleNamespace(history=2)

    def newest_frame(self, batch) -> Tensor:
        """The newest of two frames."""
        return batch.observations[:, :, -4:]

    def decode(self, features: Tensor, name: str = "jepa") -> Tensor:
        """(N, 4) -> (N, 4)."""
        assert name == "jepa"
        return features + self.error


def ideal_probe(root: Path, decoder: object = None) -> SimpleNamespace:
    """Embeddings that are labels, and three forecasters: by physics, by standing still, and by constant velocity."""
    chunks: list[int] = []

    def forecast(features: Tensor, horizon: int, name: str = "jepa") -> Tensor:
        if features.ndim == 1:
            return forecast(features[None], horizon, name)[0]
        chunks.append(len(features))
        if name == "random_encoder":
            return features[:, None].expand(-1, horizon, -1)
        state = state_from_labels(features)
        if name == "pca":
            return state_labels(constant_velocity(state, horizon))
        return state_labels(PENDULUM.simulate(state.double(), horizon + 1, dtype=torch.float32)[:, 1:])

    names = ("jepa", "random_encoder", "pca")
    data = SimpleNamespace(pendulum=PENDULUM)
    return SimpleNamespace(
        encoders=dict.fromkeys(names),
        mlp=dict.fromkeys(names, nn.Identity()),
        linear={"jepa": Scaled(1.0), "random_encoder": Scaled(0.5), "pca": Scaled(0.25)},
        forecast=forecast,
        chunks=chunks,
        decoder=decoder,
        logger=None,
        checkpoint="jepa.ckpt",
        control_steps=5,
        jepa=SimpleNamespace(image_size=16, channels=1, built_with={"latent_dim": 6}),
        trainer=SimpleNamespace(datamodule=data, default_root_dir=str(root), is_global_zero=False),
    )


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"jepa.ckpt": {"callbacks": {"Stopwatch": {"seconds": 12.5}}}}
    monkeypatch.setattr(evaluation, "read_checkpoint", files.__getitem__)


@pytest.mark.usefixtures("stopwatch")
def test_each_forecaster_has_its_own_figures(states: Tensor, tmp_path: Path) -> None:
    probe = ideal_probe(tmp_path)
    collected = dict.fromkeys(probe.encoders, state_labels(states)) | {"states": states}
    evaluate(probe, collected)
    report = json.loads((tmp_path / "report.json").read_text())
    baselines = report.pop("baselines")
    assert set(baselines) == {"random_encoder", "pca", "persistence", "constant_velocity"}
    steps = WINDOWS - 1 - START
    # By physics, nothing is lost.
    assert report["vpt_frames"] == report["vpt_frames_at_0.2"] == steps
    assert all(value < 1e-3 for value in report["rollout"]["ratio_to_persistence"].values())
    assert all(value < 5e-3 for value in report["energy_error"].values())
    assert all(value == pytest.approx(1, abs=1e-6) for value in report["probe"]["linear_r2"].values())
    # An encoder whose predictor stands still is worth what persistence is worth, and so on.
    for encoder, forecaster in (("random_encoder", "persistence"), ("pca", "constant_velocity")):
        for name in ("vpt_frames", "vpt_frames_mean", "vpt_frames_at_0.2"):
            assert baselines[encoder][name] == baselines[forecaster][name] < steps
    ones = pytest.approx({str(k): 1.0 for k in RATIO_STEPS})
    assert baselines["random_encoder"]["rollout"]["ratio_to_persistence"] == ones
    assert baselines["persistence"]["rollout"]["ratio_to_persistence"] == {str(k): 1.0 for k in RATIO_STEPS}
    assert baselines["persistence"]["vpt_frames"] < baselines["constant_velocity"]["vpt_frames"]
    one, start = scene(states), states[:, START]
    assert baselines["persistence"]["decoder"]["iou"] == pytest.approx(
        {str(k): one.overlap(one.draw(start), k) for k in (8, 16)}
    )
    assert baselines["constant_velocity"]["decoder"]["iou"] == pytest.approx(
        {str(k): one.overlap(one.draw(constant_velocity(start, k)[:, -1]), k) for k in (8, 16)}
    )
    linear = [figures["probe"]["linear_r2"]["omega1"] for figures in (report, baselines["random_encoder"], baselines["pca"])]
    assert linear[0] > linear[1] > linear[2]
    assert report["seconds"]["training"] == 12.5 and 0 < report["seconds"]["report"] < 100
    assert report["control_steps"] == 5 and report["config"] == {"latent_dim": 6}
    assert report["test_set"] == {"trajectories": 5, "windows": WINDOWS, "forecast_start": 8}
    assert "decoder" not in report and not (tmp_path / "forecast.mp4").exists()
    assert (tmp_path / "forecast_error.png").stat().st_size > 1000


class LabelPainter(Painter):
    """A decoder of embeddings that are labels: positions, to which each encoder adds an error of its own."""

    errors = {"jepa": 0.0, "random_encoder": 0.1, "pca": 0.2}  # noqa: RUF012

    def decode(self, features: Tensor, name: str = "jepa") -> Tensor:
        """(N, 6) -> (N, 4)."""
        return PENDULUM.positions(state_from_labels(features)) + self.errors[name]


@pytest.mark.usefixtures("stopwatch")
def test_with_a_decoder_each_encoder_is_decoded_by_its_own(
    states: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, filmed, drawn = {}, {}, []
    monkeypatch.setattr(
        evaluation, "write_video", lambda path, film, frames_per_second: filmed.update({path: (film, frames_per_second)})
    )
    monkeypatch.setattr(evaluation, "show", lambda run, tag, what: shown.update({tag: (run, what)}))

    def figure(truth: Tensor, decoded: dict[str, Tensor]) -> SimpleNamespace:
        drawn.append((truth, decoded))
        return SimpleNamespace(savefig=lambda path: drawn.append(path))

    monkeypatch.setattr(evaluation, "reconstruction_figure", figure)
    states = torch.cat([states, states.flip(0)])
    probe = ideal_probe(tmp_path, LabelPainter())
    data = small_data(history=2, masses=PENDULUM.masses, lengths=PENDULUM.lengths)
    data.pendulum = PENDULUM
    probe.trainer.datamodule = data
    evaluate(probe, dict.fromkeys(probe.encoders, state_labels(states)) | {"states": states})
    report = json.loads((tmp_path / "report.json").read_text())
    baselines = report["baselines"]
    # Trajectories of the truth show an image that no error has moved.
    assert report["decoder"]["iou"] == pytest.approx({"0": 1, "8": 1, "16": 1}, abs=1e-2) and report["decoder"]["mse"] < 1e-6
    for name, error in (("random_encoder", 0.1), ("pca", 0.2)):
        assert baselines[name]["decoder"]["mse"] == pytest.approx(error**2, rel=1e-3)
        assert baselines[name]["decoder"]["iou"]["0"] < 0.8
    (truth_drawn, decoded), path = drawn
    one = scene(states)
    assert path == tmp_path / "reconstruction.png" and list(decoded) == list(probe.encoders)
    assert torch.equal(truth_drawn, one.draw(states[:8, START])), "the first eight"
    for name, error in LabelPainter.errors.items():
        expected = one.image(PENDULUM.positions(states[:8, START]) + error)
        torch.testing.assert_close(decoded[name], expected, rtol=0, atol=1e-3)
    ((path, (film, rate)),) = filmed.items()
    assert path == tmp_path / "forecast.mp4" and rate == 10 and film.shape[0] == 3 * 42, "at half the speed"
    assert shown["forecast/video"][0] is probe.trainer and shown["forecast/video"][1] is film
    assert set(shown) == {"forecast/video", "forecast/position_error"}


@pytest.mark.usefixtures("stopwatch")
def test_the_figure_of_errors_has_the_median_of_each_forecaster(
    states: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def figure(curves: dict[str, Tensor], seconds: float, threshold: float) -> SimpleNamespace:
        given.append((curves, seconds, threshold))
        return SimpleNamespace(savefig=given.append)

    monkeypatch.setattr(evaluation, "forecast_figure", figure)
    probe = ideal_probe(tmp_path)
    evaluate(probe, dict.fromkeys(probe.encoders, state_labels(states)) | {"states": states})
    (curves, seconds, threshold), path = given
    assert (seconds, threshold, path) == (0.05, 0.4, tmp_path / "forecast_error.png")
    assert list(curves) == ["jepa", "random_encoder", "pca", "persistence", "constant_velocity"]
    still = scene(states).position_errors(states[:, START, None].expand(-1, 41, -1)).median(dim=0).values
    torch.testing.assert_close(curves["persistence"], still)
    torch.testing.assert_close(curves["random_encoder"], still, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(curves["pca"], curves["constant_velocity"], rtol=1e-3, atol=1e-4)
    assert curves["jepa"].max() < 1e-2


@pytest.mark.usefixtures("stopwatch")
def test_many_trajectories_are_forecast_in_parts_and_long_ones_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "CHUNK", 4)
    monkeypatch.setattr(evaluation, "MAX_STEPS", 32)
    states = PENDULUM.simulate(sample_initial_states(10, seeded_generator(4)), WINDOWS, dtype=torch.float32)
    probe = ideal_probe(tmp_path)
    evaluate(probe, dict.fromkeys(probe.encoders, state_labels(states)) | {"states": states})
    assert probe.chunks == [4, 4, 2] * 3 and CHUNK == 256
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["vpt_frames"] == 32 and report["test_set"]["trajectories"] == 10


@pytest.mark.parametrize(("windows", "enough"), [(38, False), (39, True)])
@pytest.mark.usefixtures("stopwatch")
def test_trajectories_must_reach_the_last_step_of_the_report(
    states: Tensor, tmp_path: Path, windows: int, enough: bool
) -> None:
    states = states[:, :windows]
    probe = ideal_probe(tmp_path)
    collected = dict.fromkeys(probe.encoders, state_labels(states)) | {"states": states}
    if enough:
        evaluate(probe, collected)
        return
    with pytest.raises(ValueError, match=r"Test trajectories of 38 windows are too short: .* 30 steps from window 8"):
        evaluate(probe, collected)


def test_a_checkpoint_without_a_stopwatch_has_no_seconds(
    states: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "read_checkpoint", lambda path: {})
    probe = ideal_probe(tmp_path)
    evaluate(probe, dict.fromkeys(probe.encoders, state_labels(states)) | {"states": states})
    assert json.loads((tmp_path / "report.json").read_text())["seconds"]["training"] is None
