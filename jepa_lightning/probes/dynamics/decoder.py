"""Evaluation of the pendulum's JEPA: decode frozen embeddings to what was observed.

Shapes: B batch, T windows, N samples, D embedding dimension, C channels, S image size.
"""

from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from callbacks.schedules import total_optimizer_steps
from datamodules.batches import ClipBatch
from jepa_lightning.figures import reconstruction_figure, show
from jepa_lightning.networks.decoders import ConvDecoder, MLPDecoder
from jepa_lightning.optim import parameter_groups, warmup_cosine_schedule
from jepa_lightning.probes.dynamics.base import PendulumProbe
from jepa_lightning.probes.ridge import mean_and_scale
from jepa_lightning.weights.checkpoints import load_probe


class StandardizedDecoder(nn.Module):
    """A decoder that sees each dimension with zero mean and unit variance, whatever encoder it came from."""

    mean: Tensor
    scale: Tensor

    def __init__(self, decoder: nn.Module, dim: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def fit_scale(self, features: Tensor) -> None:
        """Take mean and standard deviation from embeddings (N, D)."""
        mean, scale = mean_and_scale(features)
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, C, S, S) or (N, 4)."""
        return self.decoder((features - self.mean) / self.scale)


class DecoderProbe(PendulumProbe):
    """Decode the newest frame of each window from frozen embeddings, by the squared error of its pixels.

    The decoders of the JEPA and of both baselines are trained on the same samples for the same number of steps. Frames of
    all times are decoded, because the data module cuts its clips anywhere in a trajectory.

    Args:
        checkpoint: Path of the checkpoint of a pendulum JEPA, written by `fit`.
        encoder: Which encoder's embeddings are decoded, "target" or "context".
        decoder: "conv" for transposed convolutions (pixels only), "mlp" for fully connected layers; by default "conv" for
            pixels and "mlp" for coordinates.
        width: Channels of the last feature map (conv), or width of the two hidden layers (mlp).
        learning_rate: Peak learning rate.
        weight_decay: Weight decay of matrices and kernels.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, holds no pendulum JEPA, or an argument is out of its range.
    """

    def __init__(
        self,
        checkpoint: str,
        encoder: Literal["target", "context"] = "target",
        decoder: Literal["conv", "mlp"] | None = None,
        width: int = 8,
        learning_rate: float = 2e-3,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__(checkpoint, encoder)
        self.save_hyperparameters()
        if width < 1:
            raise ValueError(f"model.width={width}: give an integer of at least 1.")
        if not learning_rate > 0:
            raise ValueError(f"model.learning_rate={learning_rate}: must be positive.")
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.decoders = nn.ModuleDict(
            {name: StandardizedDecoder(self._build(decoder, width), self.jepa.latent_dim) for name in self.encoders}
        )
        self.errors = nn.ModuleDict({name: MeanMetric() for name in self.encoders})

    def _build(self, decoder: str | None, width: int) -> nn.Module:
        jepa = self.jepa
        pixels = jepa.observation == "pixels"
        decoder = decoder or ("conv" if pixels else "mlp")
        if decoder == "mlp":
            shape = (jepa.channels, jepa.image_size, jepa.image_size) if pixels else (4,)
            return MLPDecoder(jepa.latent_dim, shape, (width, width))
        if decoder == "conv" and pixels:
            return ConvDecoder(jepa.latent_dim, jepa.image_size, jepa.channels, width)
        raise ValueError(f"model.decoder={decoder!r}: choose 'mlp', or for pixels 'conv'.")

    def on_fit_start(self) -> None:
        if self.trainer.ckpt_path is not None:
            return  # a resumed run has its baselines and scales
        super().on_fit_start()
        for name, features in self.features(self.fit_batch()).items():
            self.decoders[name].fit_scale(features.flatten(0, 1))

    def decode(self, features: Tensor, name: str = "jepa") -> Tensor:
        """Observations from embeddings of one encoder: (..., D) -> (..., C, S, S) or (..., 4)."""
        return self.decoders[name](features.flatten(0, -2)).unflatten(0, features.shape[:-1])

    def training_step(self, batch: ClipBatch, batch_idx: int) -> Tensor:
        frames = self.newest_frame(batch)
        losses = {name: F.mse_loss(self.decode(z, name), frames) for name, z in self.features(batch).items()}
        self.log_dict({f"train/mse_{name}": loss for name, loss in losses.items()})
        self.log("train/loss", losses["jepa"], prog_bar=True)
        return torch.stack(list(losses.values())).sum()  # they share no parameter, so each is trained on its own

    def validation_step(self, batch: ClipBatch, batch_idx: int) -> None:
        frames = self.newest_frame(batch)
        features = self.features(batch)
        for name, z in features.items():
            self.errors[name].update((self.decode(z, name) - frames).square().mean())
        if batch_idx == 0 and self.jepa.observation == "pixels":
            self._show(frames[:8, 0], {name: self.decode(z[:8, 0], name) for name, z in features.items()})

    def on_validation_epoch_end(self) -> None:
        for name, metric in self.errors.items():
            self.log(f"val/mse_{name}", metric.compute())
            metric.reset()
        self.log("val/loss", self.trainer.callback_metrics["val/mse_jepa"], prog_bar=True)

    @torch.no_grad()
    def _show(self, frames: Tensor, decoded: dict[str, Tensor]) -> None:
        """Write reconstruction.png and show the same figure."""
        if not self.trainer.is_global_zero or self.trainer.sanity_checking or self.trainer.fast_dev_run:
            return
        figure = reconstruction_figure(frames, decoded)
        figure.savefig(Path(self.trainer.default_root_dir) / "reconstruction.png")
        show(self.trainer, "reconstruction", figure, self.global_step)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(parameter_groups([self.decoders], self.weight_decay), lr=self.learning_rate)
        total = total_optimizer_steps(self.trainer)
        return {"optimizer": optimizer, "lr_scheduler": warmup_cosine_schedule(optimizer, total, 0.05)}


def load_decoder(path: str) -> DecoderProbe:
    """The decoder probe in a checkpoint. Raises ValueError or FileNotFoundError if there is none."""
    return load_probe(path, DecoderProbe)
