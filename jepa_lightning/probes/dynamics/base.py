"""What the probes of the pendulum share: a frozen JEPA, and the baselines that it must beat.

Shapes: B batch, T windows, N samples, D embedding dimension.
"""

from abc import ABC
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from datamodules.batches import ClipBatch
from jepa_lightning.dynamics_checks import check_observations
from jepa_lightning.pendulum import PendulumJEPA
from jepa_lightning.probes.baselines import BASELINE_SEED, PCA, RandomEncoder
from jepa_lightning.signature import sign
from jepa_lightning.weights.checkpoints import RECORD, load_jepa, record

BASELINE_FIT_TRAJECTORIES = 1_000


class PendulumProbe(LightningModule, ABC):
    """Freeze a pendulum JEPA and fit a probe on its embeddings.

    All is learned side by side, from the same samples, for the JEPA ("jepa") and for two baselines: "random_encoder", the
    same network at random initialization, and "pca", the first D principal components of the same input.

    Args:
        checkpoint: Path of the checkpoint of a pendulum JEPA, written by `fit`.
        encoder: Which encoder's embeddings are read, "target" or "context".

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, or holds no pendulum JEPA.
    """

    def __init__(self, checkpoint: str, encoder: Literal["target", "context"] = "target") -> None:
        super().__init__()
        jepa = load_jepa(checkpoint)
        if not isinstance(jepa, PendulumJEPA):
            raise ValueError(f"{checkpoint} holds a {type(jepa).__name__}; this probe reads a PendulumJEPA.")
        if encoder not in ("target", "context"):
            raise ValueError(f"model.encoder={encoder!r}: choose 'target' or 'context'.")
        self.jepa = jepa
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(BASELINE_SEED)
            untrained = jepa.build_encoder()
        frame_size = jepa.channels * jepa.image_size**2 if jepa.observation == "pixels" else 4
        self.encoders = nn.ModuleDict(
            {
                "jepa": jepa.target_encoder if encoder == "target" else jepa.context_encoder,
                "random_encoder": RandomEncoder(untrained, jepa.latent_dim),
                "pca": PCA(frame_size * jepa.history, jepa.latent_dim),
            }
        )
        self.jepa.requires_grad_(False).eval()
        self.encoders.requires_grad_(False).eval()

    best_metric = ("val/loss", "min")  # of a decoder that sees the truth, unlike a JEPA's

    def train(self, mode: bool = True) -> "PendulumProbe":
        """Switch to training mode, all but the frozen networks."""
        super().train(mode)
        self.jepa.eval()
        self.encoders.eval()
        return self

    def setup(self, stage: str) -> None:
        """Check that the data is what the JEPA was trained on.

        Raises:
            ValueError: Observations of another kind, size or history.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is not None:
            check_observations(self.jepa, data)

    def on_fit_start(self) -> None:
        """Fit the baselines on the first training trajectories, the same ones in every process."""
        windows = self.fit_batch().observations.flatten(0, 1)
        for name in ("random_encoder", "pca"):
            self.encoders[name].fit(windows)

    def fit_batch(self) -> ClipBatch:
        """Three windows, spread over the time, of each of the first training trajectories."""
        data: Any = self.trainer.datamodule
        states = data.trajectories("train")[:BASELINE_FIT_TRAJECTORIES].to(self.device)
        last = states.shape[1] - self.jepa.history
        parts = [data.observe(states[:, start : start + self.jepa.history]) for start in (0, last // 2, last)]
        observations, true_states = (
            torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("observations", "states")
        )
        return ClipBatch(observations, true_states)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        sign(self, checkpoint)
        checkpoint[RECORD] = record(self.jepa)

    @torch.no_grad()
    def features(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Features of every encoder at all times: name -> (B, T, D)."""
        return {name: self.jepa.encode_windows(encoder, batch.observations) for name, encoder in self.encoders.items()}

    def newest_frame(self, batch: ClipBatch) -> Tensor:
        """The newest frame of each window: (B, T, C, S, S), or (B, T, 4) of coordinates."""
        size = self.jepa.channels if self.jepa.observation == "pixels" else 4
        return batch.observations[:, :, -size:]
