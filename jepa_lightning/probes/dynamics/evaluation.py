"""Evaluation of a trained pendulum JEPA on held-out trajectories, compared with its baselines.

Every figure of the JEPA stands next to those of the random-initialization baseline and of principal components (each with
probes, decoder and predictor trained on the same data), of persistence (nothing moves) and of constant angular velocity
(both angles go on as they do at the start, known exactly).

Shapes: N trajectories, T windows, K steps ahead, D embedding dimension.
"""

import math
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from datamodules.batches import ClipBatch
from datamodules.physics import FRAME_SECONDS, LABELS, Pendulum, state_labels
from datamodules.rendering import render
from jepa_lightning.figures import forecast_figure, reconstruction_figure, rows_figure, show, side_by_side, write_video
from jepa_lightning.metrics import FeatureStatistics, r2_score, valid_prediction_time
from jepa_lightning.pendulum import PendulumJEPA
from jepa_lightning.probes.dynamics.decoder import DecoderProbe
from jepa_lightning.probes.report import write_report
from jepa_lightning.weights.checkpoints import read_checkpoint

START = 8
"""Window from which forecasts start, away from the distribution that initial states are drawn from."""

MAX_STEPS = 100
"""Steps of the longest forecast; a valid-prediction time cannot exceed it."""

RATIO_STEPS = (1, 2, 4, 8, 16, 30)
DECODE_STEPS = (0, 8, 16)
ENERGY_STEPS = (8, 16, 30)
VALID_BELOW = 0.4
FILM_TRAJECTORIES, FILM_FRAMES = 3, 60
STILLS = torch.tensor([0, 4, 8, 12, 16, 20, 24, 30])
"""Frames of forecast.png."""
CHUNK = 256


def state_from_labels(labels: Tensor) -> Tensor:
    """(sin, cos, sin, cos, omega1, omega2) -> (theta1, theta2, omega1, omega2): (..., 6) -> (..., 4)."""
    sin1, cos1, sin2, cos2, omega1, omega2 = labels.unbind(-1)
    return torch.stack([torch.atan2(sin1, cos1), torch.atan2(sin2, cos2), omega1, omega2], dim=-1)


def constant_velocity(state: Tensor, num_steps: int) -> Tensor:
    """States 1 ... K frames later if both rods went on turning as they do: (N, 4) -> (N, K, 4)."""
    seconds = FRAME_SECONDS * torch.arange(1, num_steps + 1, device=state.device)
    angles = state[:, None, :2] + seconds[:, None] * state[:, None, 2:]
    return torch.cat([angles, state[:, None, 2:].expand_as(angles)], dim=-1)


def intersection_over_union(images: Tensor, truth: Tensor) -> Tensor:
    """Overlap of what is brighter than 0.5 in any channel, per image: (N, C, S, S) twice -> (N,)."""
    mine, true = (image.amax(dim=1).flatten(1) > 0.5 for image in (images, truth))
    return (mine & true).sum(dim=1) / (mine | true).sum(dim=1).clamp(min=1)


def validity_figures(errors: Tensor) -> dict[str, Any]:
    """Valid-prediction times of forecasts with these errors (N, K), in frames."""
    times = valid_prediction_time(errors, VALID_BELOW).double()
    return {
        "vpt_frames": times.median().item(),
        "vpt_frames_mean": times.mean().item(),
        "vpt_frames_standard_error": (times.std() / math.sqrt(len(times))).item(),
        "vpt_frames_at_0.2": valid_prediction_time(errors, 0.2).double().median().item(),
    }


class FittedProbe(Protocol):
    """What the report needs of a `StateProbe`."""

    trainer: Any
    jepa: PendulumJEPA
    encoders: nn.ModuleDict
    linear: nn.ModuleDict
    mlp: nn.ModuleDict
    decoder: DecoderProbe | None
    checkpoint: str
    control_steps: int

    def forecast(self, features: Tensor, horizon: int, name: str = "jepa") -> Tensor:
        """Predicted embeddings of one encoder 1 ... H frames later: (..., D) -> (..., H, D)."""


def evaluate(probe: FittedProbe, collected: dict[str, Tensor]) -> None:
    """Compute the report of a fitted state probe and write it into the run directory.

    Args:
        probe: Fitted state probe, with its decoder if there is one.
        collected: Test embeddings of each encoder, (N, T, D), and "states", (N, T, 4).

    Raises:
        ValueError: Test trajectories too short to forecast from.
    """
    began = time.monotonic()
    states = collected["states"]
    num_steps = min(MAX_STEPS, states.shape[1] - 1 - START)
    if num_steps < max(RATIO_STEPS):
        raise ValueError(
            f"Test trajectories of {states.shape[1]} windows are too short: the report forecasts {max(RATIO_STEPS)} steps "
            f"from window {START}. Set data.test_sequence_length to at least 110."
        )
    data: Any = probe.trainer.datamodule
    scene = Scene(data.pendulum, probe.jepa.image_size, states)
    root = Path(probe.trainer.default_root_dir)
    figures: dict[str, dict[str, Any]] = {}
    curves: dict[str, Tensor] = {}

    for name in probe.encoders:
        features = collected[name]
        forecast = torch.cat([probe.forecast(chunk, num_steps, name) for chunk in features[:, START].split(CHUNK)])
        errors = scene.position_errors(state_from_labels(probe.mlp[name](forecast)))
        curves[name] = errors.median(dim=0).values
        figures[name] = {
            "probe": readout_figures(probe, name, features, forecast, states),
            "rollout": {"ratio_to_persistence": ratios_to_persistence(features, forecast)},
            **validity_figures(errors),
            "energy_error": energy_figures(probe.mlp[name], scene, features, forecast),
            "rankme": rankme(features),
        }
        if probe.decoder is not None:
            figures[name]["decoder"] = decoder_figures(probe.decoder, name, scene, data, features, forecast)

    start = states[:, START]
    for name, guess in (
        ("persistence", start[:, None].expand(-1, num_steps, -1)),
        ("constant_velocity", constant_velocity(start, num_steps)),
    ):
        errors = scene.position_errors(guess)
        curves[name] = errors.median(dim=0).values
        overlap = {str(k): scene.overlap(scene.draw(guess[:, k - 1]), k) for k in DECODE_STEPS if k > 0}
        figures[name] = {**validity_figures(errors), "decoder": {"iou": overlap}}
    figures["persistence"]["rollout"] = {"ratio_to_persistence": {str(k): 1.0 for k in RATIO_STEPS}}

    figure = forecast_figure(curves, FRAME_SECONDS, VALID_BELOW)
    figure.savefig(root / "forecast_error.png")
    show(probe.trainer, "forecast/position_error", figure)
    if probe.decoder is not None:
        shown = {name: scene.image(probe.decoder.decode(collected[name][:8, START], name)) for name in probe.encoders}
        reconstruction_figure(scene.draw(states[:8, START]), shown).savefig(root / "reconstruction.png")
        panels = forecast_panels(probe, scene, collected["jepa"])
        stills = {title: images[STILLS[STILLS < len(images)]] for title, images in panels[0].items()}
        rows_figure(stills).savefig(root / "forecast.png")
        film = np.concatenate([side_by_side(panel) for panel in panels])
        write_video(root / "forecast.mp4", film, frames_per_second=round(1 / FRAME_SECONDS / 2))
        show(probe.trainer, "forecast/video", film)

    stopwatch = read_checkpoint(probe.checkpoint).get("callbacks", {}).get("Stopwatch", {})
    report = figures.pop("jepa") | {
        "baselines": figures,
        "seconds": {"training": stopwatch.get("seconds"), "report": time.monotonic() - began},
        "control_steps": probe.control_steps,
        "test_set": {"trajectories": len(states), "windows": states.shape[1], "forecast_start": START},
        "config": probe.jepa.built_with,
    }
    write_report(root, report)


class Scene:
    """The test trajectories as forecasts see them: what is true k steps after the start.

    Args:
        pendulum: Pendulum with the constants of the data.
        image_size: Height and width S of the images in pixels.
        states: States of the trajectories, (N, T, 4).
    """

    def __init__(self, pendulum: Pendulum, image_size: int, states: Tensor) -> None:
        self.pendulum, self.image_size, self.states = pendulum, image_size, states
        self.spread = pendulum.positions(states).flatten(0, 1).var(dim=0).sum().sqrt()

    def draw(self, states: Tensor) -> Tensor:
        """(N, 4) -> (N, 1, S, S)."""
        return render(states, self.image_size, self.pendulum.lengths)

    def image(self, decoded: Tensor) -> Tensor:
        """What a decoder returned, as images: (N, C, S, S) as it is, coordinates x1, y1, x2, y2 (N, 4) drawn."""
        if decoded.ndim == 4:
            return decoded
        x1, y1, x2, y2 = decoded.unbind(-1)
        return self.draw(torch.stack([torch.atan2(x1, -y1), torch.atan2(x2 - x1, y1 - y2)], dim=-1))

    def position_errors(self, guess: Tensor) -> Tensor:
        """Distance of all four coordinates from the truth, relative to their spread: (N, K, 4) states -> (N, K)."""
        truth = self.states[:, START + 1 : START + 1 + guess.shape[1]]
        return (self.pendulum.positions(guess) - self.pendulum.positions(truth)).norm(dim=-1) / self.spread

    def overlap(self, images: Tensor, k: int) -> float:
        """Mean intersection over union of images (N, C, S, S) with the truth k steps after the start."""
        return intersection_over_union(images, self.draw(self.states[:, START + k])).mean().item()


def readout_figures(
    probe: FittedProbe, name: str, features: Tensor, forecast: Tensor, states: Tensor
) -> dict[str, dict[str, Any]]:
    """R2 of each label on encoded embeddings, and of the same probes on forecast embeddings."""
    labels = state_labels(states)
    figures: dict[str, dict[str, Any]] = {}
    for kind, regressor in (("linear", probe.linear[name]), ("mlp", probe.mlp[name])):
        scores = r2_score(regressor(features).flatten(0, 1), labels.flatten(0, 1))
        figures[f"{kind}_r2"] = dict(zip(LABELS, scores.tolist(), strict=True))
        figures[f"{kind}_r2_forecast"] = {
            str(k): dict(zip(LABELS, r2_score(regressor(forecast[:, k - 1]), labels[:, START + k]).tolist(), strict=True))
            for k in (1, 8, 16)
        }
    return figures


def ratios_to_persistence(features: Tensor, forecast: Tensor) -> dict[str, float]:
    """Squared forecast error over the squared change of the embeddings, k steps ahead."""
    start = features[:, START]
    ratios = {}
    for k in RATIO_STEPS:
        truth = features[:, START + k]
        ratios[str(k)] = ((forecast[:, k - 1] - truth).square().sum() / (start - truth).square().sum()).item()
    return ratios


def energy_figures(regressor: nn.Module, scene: Scene, features: Tensor, forecast: Tensor) -> dict[str, float]:
    """Median error of the energy regressed from embeddings k steps ahead, as a fraction of the energy above rest.

    At k = 0 it is the error of the regression; later, the change since k = 0, which physics forbids.
    """
    true = scene.pendulum.energy(scene.states[:, START])
    scale = true - scene.pendulum.lowest_energy
    first = scene.pendulum.energy(state_from_labels(regressor(features[:, START])))
    errors = {"0": ((first - true).abs() / scale).median().item()}
    for k in ENERGY_STEPS:
        later = scene.pendulum.energy(state_from_labels(regressor(forecast[:, k - 1])))
        errors[str(k)] = ((later - first).abs() / scale).median().item()
    return errors


def rankme(features: Tensor) -> float:
    """Effective number of dimensions in use, of D."""
    statistics = FeatureStatistics(features.shape[-1]).to(features.device)
    statistics.update(features)
    return statistics.compute()["rankme"].item()


def decoder_figures(
    decoder: DecoderProbe, name: str, scene: Scene, data: Any, features: Tensor, forecast: Tensor
) -> dict[str, Any]:
    """Overlap with the truth of what is decoded from encoded (k = 0) and forecast embeddings, and the error at k = 0."""
    overlap = {}
    for k in DECODE_STEPS:
        decoded = decoder.decode(features[:, START] if k == 0 else forecast[:, k - 1], name)
        overlap[str(k)] = scene.overlap(scene.image(decoded), k)
    history = decoder.jepa.history
    # A window's newest frame, at nine times of each trajectory.
    times = torch.linspace(0, features.shape[1] - 1, 9).long()
    truth = torch.cat([data.observe(scene.states[:, t : t + 1].expand(-1, history, -1)).observations for t in times])
    frames = decoder.newest_frame(ClipBatch(truth, scene.states))[:, 0]
    decoded = torch.cat([decoder.decode(features[:, t], name) for t in times])
    error = (decoded - frames).square().mean()
    constant = (frames - frames.mean(dim=0)).square().mean()
    return {"iou": overlap, "mse": error.item(), "mse_over_mean_image": (error / constant).item()}


def forecast_panels(probe: FittedProbe, scene: Scene, features: Tensor) -> list[dict[str, Tensor]]:
    """Truth, forecast and reconstruction of the first test trajectories: title -> images (T, C, S, S) of each."""
    assert probe.decoder is not None
    panels = []
    for trajectory in range(min(FILM_TRAJECTORIES, len(features))):
        seen = features[trajectory, START : START + FILM_FRAMES]
        predicted = torch.cat([seen[:1], probe.forecast(seen[0], len(seen) - 1)])
        forecast, reconstruction = (scene.image(probe.decoder.decode(z)) for z in (predicted, seen))
        true_states = scene.states[trajectory, START : START + FILM_FRAMES]
        truth = render(true_states, scene.image_size, scene.pendulum.lengths, probe.jepa.channels)
        panels.append({"truth": truth, "forecast from frame 0": forecast, "reconstruction": reconstruction})
    return panels
