"""Evaluation of a world model in pixel space: what do its roll-outs look like, and how far are they from the truth?

Shapes: B batch, T windows, K steps ahead, D embedding dimension, A scalars of an action, C channels, H W pixels.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.image import StructuralSimilarityIndexMeasure

from jepa_lightning.dynamics_checks import check_observations
from jepa_lightning.encoder_decoder import EncoderDecoder
from jepa_lightning.figures import rows_figure, show, side_by_side, write_video
from jepa_lightning.probes.dynamics.forecast_report import (
    SIMILARITIES,
    ForecastSums,
    forecast_figures,
    forecast_table,
    shown_steps,
)
from jepa_lightning.probes.dynamics.image_decoder import load_state_decoder, newest_images
from jepa_lightning.probes.dynamics.world_model_probe import check_same, world_model
from jepa_lightning.probes.report import save_report

FILMED, FRAMES_PER_SECOND = 4, 5
"""Clips in the video, and its speed."""

COLUMNS = 10
"""Maximum number of images in a row of the figure."""


class ForecastProbe(LightningModule):
    """Decode the roll-outs of a world model on held-out clips, and compare them with what was seen.

    There is nothing to fit: `test` alone writes report.json, report.md, forecast.png and forecast.mp4. A roll-out starts at
    the first window of a clip. Its images, of the newest frame, are compared with the true ones by squared error and
    structural similarity, next to those under the actions of another clip, to persistence (the last true frame) and to the
    mean image. At step 0 stands what the decoder makes of the first window itself, below which no forecast can be expected
    to come.

    Args:
        checkpoint: Path of the checkpoint of a dynamics JEPA with actions, written by `fit`.
        decoder: Path of the checkpoint of an `ImageDecoder` on the same JEPA. None for an `EncoderDecoder`, which has a
            decoder of its own.
        steps: Steps ahead K; as many as the data's clips allow by default.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, holds no world model with actions, has no decoder, or an argument is out of its range.
    """

    def __init__(self, checkpoint: str, decoder: str | None = None, steps: int | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        if steps is not None and steps < 1:
            raise ValueError(f"model.steps={steps}: give an integer of at least 1, or null for what the clips allow.")
        self.checkpoint, self.steps = checkpoint, steps
        self.jepa = world_model(checkpoint, "ForecastProbe")
        if decoder is None and not isinstance(self.jepa, EncoderDecoder):
            raise ValueError(
                f"{checkpoint} holds a {type(self.jepa).__name__}, which decodes no images: fit an ImageDecoder on it, and "
                "set model.decoder to its checkpoint."
            )
        self.decoder = None if decoder is None else load_state_decoder(decoder).requires_grad_(False).eval()
        if self.decoder is not None:
            check_same(
                self.jepa,
                self.decoder.jepa,
                f"model.decoder={decoder} decodes another JEPA than {checkpoint}: fit the decoder anew.",
            )

    def setup(self, stage: str) -> None:
        """Compare with the data module.

        Raises:
            ValueError: It is not that of the model, its clips are too short, or several processes.
        """
        if self.trainer.world_size > 1:
            raise ValueError("The report is made in one process: set --trainer.devices 1.")
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is not None:
            check_observations(self.jepa, data)

    def decode(self, features: Tensor) -> Tensor:
        """Images of the newest frame from embeddings of the encoder: (..., D) -> (..., C, H, W)."""
        if self.decoder is not None:
            return self.decoder.decode(features)
        assert isinstance(self.jepa, EncoderDecoder)
        return self._newest(self.jepa.decode(features))

    def forecast(self, features: Tensor, actions: Tensor) -> Tensor:
        """Images of the newest frame 1 ... K steps ahead: (B, D) and actions (B, K, A) -> (B, K, C, H, W)."""
        if self.decoder is not None:
            return self.decoder.decode(self.jepa.forecast(features, actions.shape[1], actions))
        assert isinstance(self.jepa, EncoderDecoder)
        return self._newest(self.jepa.forecast_images(features, actions.shape[1], actions))

    def _newest(self, windows: Tensor) -> Tensor:
        """(..., history * C, H, W) -> (..., C, H, W), of which windows hold the oldest frame first."""
        return windows[..., -self.jepa.channels :, :, :]

    def on_test_epoch_start(self) -> None:
        self._sums = ForecastSums()
        self._clips: list[dict[str, Tensor]] = []  # those that are shown
        self._last_actions: Tensor | None = None
        self.similarities = nn.ModuleDict()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        batch = self.jepa.as_batch(batch, batch_idx)
        steps = batch.observations.shape[1] - 1 if self.steps is None else self.steps
        if not 1 <= steps < batch.observations.shape[1]:
            raise ValueError(
                f"model.steps={steps} needs clips of more than {steps} windows; the data's have "
                f"{batch.observations.shape[1]}: lower it, or lengthen the clips (data.windows)."
            )
        first = batch.vectors if batch.vectors is None else batch.vectors[:, :1]
        features = self.jepa.encode(batch.observations[:, :1], first)[:, 0]  # (B, D)
        frames = newest_images(self.jepa, getattr(self.trainer, "datamodule", None), batch)[:, : steps + 1]
        start, truth = frames[:, :1], frames[:, 1:]
        actions = batch.actions[:, :steps]
        found = {"true": self.forecast(features, actions), "persistence": start.expand_as(truth)}
        others = self._others(actions)
        if others is not None:
            found["shuffled"] = self.forecast(features, others)
        for kind, images in found.items():
            self._sums.add(kind, images, truth)
            for step in shown_steps(steps):
                self._compare(f"{kind}_{step}", images[:, step - 1], truth[:, step - 1])
        decoded = self.decode(features)[:, None]
        self._sums.add("start", decoded, start)
        self._compare("start", decoded[:, 0], start[:, 0])
        self._sums.add_truth(truth)
        if others is not None:
            shown = {"truth": frames, "true actions": torch.cat([decoded, found["true"]], dim=1)}
            shown["shuffled"] = torch.cat([decoded, found["shuffled"]], dim=1)
            for row in range(min(len(frames), FILMED - len(self._clips))):
                self._clips.append({title: images[row].cpu() for title, images in shown.items()})

    def _others(self, actions: Tensor) -> Tensor | None:
        """Actions of another clip for each clip: those of the one before it, (B, K, A).

        The first clip has none before it: in a batch of several it gets those of the last, alone it is left out (None).
        """
        before = self._last_actions
        self._last_actions = actions[-1:]
        if before is None:
            return actions.roll(1, dims=0) if len(actions) > 1 else None
        return torch.cat([before, actions[:-1]])

    def _compare(self, name: str, images: Tensor, truth: Tensor) -> None:
        """Add the structural similarity of images (B, C, H, W) to the truth."""
        if name not in self.similarities:
            self.similarities[name] = StructuralSimilarityIndexMeasure(data_range=(0.0, 1.0)).to(self.device)
        self.similarities[name].update(images.float(), truth.float())

    def on_test_epoch_end(self) -> None:
        means = self._sums.means()
        steps = len(means["true"])
        found = {name: metric.compute().item() for name, metric in self.similarities.items()}
        similarities = {
            kind: {str(step): found[f"{kind}_{step}"] for step in shown_steps(steps)}
            for kind in SIMILARITIES
            if f"{kind}_1" in found or f"{kind}_{steps}" in found
        }
        report: dict[str, Any] = {"steps": steps, "clips": self._sums.clips, "reconstruction_error": means["start"].item()}
        report |= forecast_figures(means) | {"reconstruction_similarity": found["start"]}
        report |= {"structural_similarity": similarities, "checkpoint": self.checkpoint}
        directory = Path(self.trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        if self._clips:
            self._show(directory)
        notes = (
            f"Of `{self.checkpoint}`: {self._sums.clips} held-out clips, one roll-out of {steps} steps from the first "
            "window of each, decoded to the newest frame. Step 0 is the decoded first window, without any prediction. The "
            "mean image is that of the true frames which were forecast."
        )
        save_report(directory, report, "Forecasts in pixel space", notes, forecast_table(report))

    def _show(self, directory: Path) -> None:
        """Write forecast.png of the first clip and forecast.mp4 of a few, and show the same."""
        times = np.linspace(0, len(self._clips[0]["truth"]) - 1, COLUMNS).round().astype(int)
        figure = rows_figure({title: images[np.unique(times)] for title, images in self._clips[0].items()})
        figure.savefig(directory / "forecast.png")
        show(self.trainer, "forecast", figure)
        film = np.concatenate([side_by_side(clip) for clip in self._clips])
        write_video(directory / "forecast.mp4", film, FRAMES_PER_SECOND)
        show(self.trainer, "forecast/video", film)
