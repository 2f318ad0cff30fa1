"""Evaluation of a world model: what image does an embedding, or a predicted one, decode to?

Shapes: B batch, T windows, N samples, D embedding dimension, C channels, H W pixels.
"""

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from datamodules.batches import ClipBatch
from datamodules.rendering import render
from jepa_lightning.dynamics import DynamicsJEPA
from jepa_lightning.dynamics_checks import as_pair
from jepa_lightning.figures import rows_figure, show
from jepa_lightning.networks.decoders import LatentDecoder
from jepa_lightning.pendulum import PendulumJEPA
from jepa_lightning.probes.dynamics.decoder import StandardizedDecoder
from jepa_lightning.probes.dynamics.evaluation import intersection_over_union
from jepa_lightning.probes.dynamics.world_model_probe import SCALED_ON, WorldModelProbe, world_model
from jepa_lightning.weights.checkpoints import load_probe

EmbeddingSource = Literal["online", "target", "predicted"]

SHOWN = 8
"""Images in a figure."""


def actuated_jepa(checkpoint: str, reader: str) -> PendulumJEPA:
    """As `world_model`, of the actuated pendulum."""
    jepa = world_model(checkpoint, reader)
    if not isinstance(jepa, PendulumJEPA):
        raise ValueError(f"{checkpoint} holds a {type(jepa).__name__}; {reader} reads a PendulumJEPA.")
    return jepa


def true_images(jepa: PendulumJEPA, data: Any, states: Tensor) -> Tensor:
    """What states of the pendulum look like, whatever the JEPA observes: (..., 4) -> (..., C, S, S)."""
    return render(states.float(), jepa.image_size, data.pendulum.lengths, jepa.channels)


def newest_images(jepa: DynamicsJEPA, data: Any, batch: ClipBatch) -> Tensor:
    """The image of each window's newest frame, drawn if the JEPA observes coordinates: (B, T, C, H, W)."""
    if jepa.sees_pixels:
        return batch.observations[:, :, -jepa.channels :]
    assert batch.states is not None and isinstance(jepa, PendulumJEPA)
    return true_images(jepa, data, batch.states)


class ImageDecoder(WorldModelProbe):
    """Decode frozen embeddings of a world model to the image of the newest frame, with a small transformer.

    `fit` also writes reconstruction.png, with the truth above what is decoded from the embeddings of each kind, one step
    predictions included. The error is compared with that of the mean image ("val/mse_over_mean") and of the image one step
    before ("val/mse_still"); of the pendulum, which is bright on black, also the overlap ("val/iou_still").

    Args:
        checkpoint: Path of the checkpoint of a dynamics JEPA with actions, written by `fit`.
        embedding_source: What is decoded in training: embeddings of the context encoder ("online"), of the target encoder
            ("target"), or those that the predictor makes of the target encoder's one step before ("predicted").
        width: Token dimension of the transformer, a multiple of 32.
        depth: Number of layers of the transformer.
        learning_rate: Peak learning rate.
        weight_decay: Weight decay of matrices.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, holds no dynamics JEPA with actions and images, or an argument is out
            of its range.
    """

    def __init__(
        self,
        checkpoint: str,
        embedding_source: EmbeddingSource = "target",
        width: int = 64,
        depth: int = 2,
        learning_rate: float = 2e-3,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__(checkpoint, learning_rate, weight_decay)
        self.save_hyperparameters()
        if embedding_source not in get_args(EmbeddingSource):
            raise ValueError(
                f"model.embedding_source={embedding_source!r}: choose one of {', '.join(get_args(EmbeddingSource))}."
            )
        for name, value in (("width", width), ("depth", depth)):
            if value < 1:
                raise ValueError(f"model.{name}={value}: give an integer of at least 1.")
        if width % 32:
            raise ValueError(f"model.width={width}: give a multiple of 32, the width of an attention head.")
        self.source = embedding_source
        if not (self.jepa.sees_pixels or isinstance(self.jepa, PendulumJEPA)):
            raise ValueError(f"{checkpoint} holds a model of vectors: an ImageDecoder needs images.")
        network = LatentDecoder(self.jepa.latent_dim, as_pair(self.jepa.image_size), self.jepa.channels, width, depth)
        self.decoder = StandardizedDecoder(network, self.jepa.latent_dim)
        names = (*get_args(EmbeddingSource), "mean", "still")
        self.errors = nn.ModuleDict({name: MeanMetric() for name in names})
        overlaps = (*get_args(EmbeddingSource), "still") if isinstance(self.jepa, PendulumJEPA) else ()
        self.overlaps = nn.ModuleDict({name: MeanMetric() for name in overlaps})

    def on_fit_start(self) -> None:
        if self.trainer.ckpt_path is None:  # a resumed run has its scales
            data: Any = self.trainer.datamodule
            batch = data.first_clips(SCALED_ON, self.device)
            self.decoder.fit_scale(self.features(batch, self.source)[self.source].flatten(0, 1))

    @torch.no_grad()
    def features(self, batch: ClipBatch, *sources: EmbeddingSource) -> dict[EmbeddingSource, Tensor]:
        """Features of some kinds, of all windows but the first: source -> (B, T - 1, D)."""
        found: dict[EmbeddingSource, Tensor] = {}
        if "online" in sources:
            vectors = None if batch.vectors is None else batch.vectors[:, 1:]
            found["online"] = self.jepa.encode_windows(self.jepa.context_encoder, batch.observations[:, 1:], vectors)
        if "target" in sources or "predicted" in sources:
            target = self.jepa.encode_batch(batch)
            found |= {"target": target[:, 1:], "predicted": self.jepa.predictor(target[:, :-1], batch.actions)}
        return found

    def decode(self, features: Tensor) -> Tensor:
        """Images: (..., D) -> (..., C, H, W)."""
        return self.decoder(features.flatten(0, -2)).unflatten(0, features.shape[:-1])

    def training_step(self, batch: ClipBatch, batch_idx: int) -> Tensor:
        decoded = self.decode(self.features(batch, self.source)[self.source])
        loss = F.mse_loss(decoded, newest_images(self.jepa, self.trainer.datamodule, batch)[:, 1:])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: ClipBatch, batch_idx: int) -> None:
        truth = newest_images(self.jepa, self.trainer.datamodule, batch)  # (B, T, C, H, W)
        goal = truth[:, 1:].flatten(0, 1)
        features = self.features(batch, *get_args(EmbeddingSource))
        decoded = {source: self.decode(features[source]) for source in get_args(EmbeddingSource)}
        for source, images in decoded.items():
            self.errors[source].update((images.flatten(0, 1) - goal).square().mean())
            if self.overlaps:
                self.overlaps[source].update(intersection_over_union(images.flatten(0, 1), goal))
        self.errors["mean"].update((goal - goal.mean(dim=0)).square().mean())
        self.errors["still"].update((truth[:, :-1].flatten(0, 1) - goal).square().mean())
        if self.overlaps:
            self.overlaps["still"].update(intersection_over_union(truth[:, :-1].flatten(0, 1), goal))
        if batch_idx == 0:
            self._show({"truth": truth[:SHOWN, 1]} | {source: images[:SHOWN, 0] for source, images in decoded.items()})

    def on_validation_epoch_end(self) -> None:
        errors = {name: metric.compute() for name, metric in self.errors.items()}
        self.log("val/loss", errors[self.source], prog_bar=True)
        self.log_dict({f"val/mse_{name}": errors[name] for name in (*get_args(EmbeddingSource), "still")})
        self.log("val/mse_over_mean", errors[self.source] / errors["mean"])
        self.log_dict({f"val/iou_{name}": metric.compute() for name, metric in self.overlaps.items()})
        for metric in (*self.errors.values(), *self.overlaps.values()):
            metric.reset()

    def _show(self, rows: dict[str, Tensor]) -> None:
        """Write reconstruction.png and show the same figure."""
        if not self.trainer.is_global_zero or self.trainer.sanity_checking or self.trainer.fast_dev_run:
            return
        figure = rows_figure(rows)
        figure.savefig(Path(self.trainer.default_root_dir) / "reconstruction.png")
        show(self.trainer, "reconstruction", figure, self.global_step)


def load_state_decoder(path: str) -> ImageDecoder:
    """The image decoder in a checkpoint. Raises ValueError or FileNotFoundError if there is none."""
    return load_probe(path, ImageDecoder)
