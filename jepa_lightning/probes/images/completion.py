"""Evaluation of an image JEPA: decode patch features to pixels, and inpaint what is hidden from predicted ones.

Shapes: B batch, N patches, K kept patches, M target blocks, L patches of a block, H W pixels, D embedding dimension.
"""

from pathlib import Path
from typing import Literal, NamedTuple

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from callbacks.schedules import total_optimizer_steps
from datamodules.batches import ImageBatch, batch_generator
from datamodules.preprocessing import denormalize
from datamodules.views import COLORS, Views, action_to
from jepa_lightning.figures import hide_patches, rows_figure, show, to_colors
from jepa_lightning.image_jepa import ImageJEPA
from jepa_lightning.iwm import IWM
from jepa_lightning.mean_reciprocal_rank import JITTERED, make_versions
from jepa_lightning.networks.decoders import PatchDecoder
from jepa_lightning.networks.vit import layer_norm, take
from jepa_lightning.optim import parameter_groups, warmup_cosine_schedule
from jepa_lightning.probes.images.base import ImageProbe
from jepa_lightning.probes.report import save_report
from jepa_lightning.weights.checkpoints import DESCRIBED

SHOWN = 8
"""Images in the figure."""

STEPS = 9
"""Positions of an action sweep, from one unit less to one unit more; see `datamodules.views.COLORS`."""


class Completion(NamedTuple):
    """Which patches were visible and which were targets, and decoded images: normalized pixels (B, 3, H, W)."""

    visible: Tensor
    """(B, N), bool: patches that the context encoder saw."""

    targets: Tensor
    """(B, N), bool: patches of the target blocks."""

    completed: Tensor
    """Decoded from the context's features and, where nothing was visible, from predicted ones."""

    reconstructed: Tensor
    """Decoded from the target encoder's features of the whole image."""


class CompletionProbe(ImageProbe):
    """Decode pixels from frozen patch features, and inpaint (complete) images whose patches are hidden in blocks.

    A small transformer learns to decode the image from the layer-normalized features of the target encoder, the space in
    which I-JEPA predicts; another one learns the same from the randomly initialized encoder. Neither ever sees a prediction.
    Then the visible patches are encoded, the hidden ones predicted, and all of them decoded. Validation writes
    completion.png: image, what was visible, the completion, and the reconstruction from true features. `test` adds
    report.json and report.md, with the squared errors (normalized pixels) on the target blocks compared with those of the
    mean visible color.

    A deterministic prediction in embedding space is decoded as an average of what may be there: blurred, not invented.

    For an IWM, which predicts all that is hidden at once, validation also writes action_sweep.png: an image with more and
    less brightness, contrast, saturation and hue, true and as decoded from the world model's predictions.

    Args:
        checkpoint: Path of the checkpoint of an I-JEPA or IWM, written by `fit` or imported.
        width: Token dimension of the decoder, a multiple of 64.
        depth: Number of blocks of the decoder.
        learning_rate: Peak learning rate.
        weight_decay: Weight decay of matrices.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, holds no such model, or an argument is out of its range.
    """

    titles = {  # noqa: RUF012
        "reconstruction": "decoded from the true features",
        "completion": "decoded from predicted features",
        "untrained_reconstruction": "decoded from true features of the randomly initialized encoder",
        "mean_color": "mean color of the visible patches",
    }

    needs_labels = False

    any_size = False

    def __init__(
        self,
        checkpoint: str,
        width: int = 192,
        depth: int = 4,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__(checkpoint, "target", None)
        self.save_hyperparameters()
        if width < 64 or width % 64 or depth < 1:
            raise ValueError(f"model.width={width}, model.depth={depth}: give a multiple of 64 and at least one block.")
        if not learning_rate > 0:
            raise ValueError(f"model.learning_rate={learning_rate}: must be positive.")
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        sizes = (self.encoder.grid, self.encoder.dim, self.encoder.patch_size, width, depth)
        self.decoders = nn.ModuleDict({"jepa": PatchDecoder(*sizes), "untrained": PatchDecoder(*sizes)})
        self.errors = nn.ModuleDict({name: MeanMetric() for name in self.titles})

    def take(self, jepa: ImageJEPA) -> None:
        if jepa.channels != 3:
            raise ValueError(f"{self.checkpoint} reads images of {jepa.channels} channels; CompletionProbe decodes colors.")
        self.context_encoder, self.predictor, self.masks = jepa.context_encoder, jepa.predictor, jepa.masks
        self.predicts_normalized = jepa.normalize_targets
        self.apply_actions = jepa.apply_actions if isinstance(jepa, IWM) else None
        self.views = Views(**(getattr(jepa, "trained_on", None) or {}))
        if isinstance(jepa, IWM):
            jepa.check_completes()
        read = not str(self.checkpoint).endswith(DESCRIBED)  # or else its weights are still to come
        pairs = zip(jepa.context_encoder.parameters(), jepa.target_encoder.parameters(), strict=True)
        if read and not getattr(jepa, "freeze_encoder", False) and all(torch.equal(*pair) for pair in pairs):
            raise ValueError(
                f"{self.checkpoint} has one and the same context and target encoder, as an import of an encoder alone has: "
                "its predictor is untrained, and cannot complete anything."
            )

    @torch.no_grad()
    def features(self, images: Tensor, which: Literal["jepa", "untrained"] = "jepa") -> Tensor:
        """Layer-normalized patch features: (B, 3, H, W) -> (B, N, D)."""
        features = (self.encoder if which == "jepa" else self.untrained)(images)
        return layer_norm(features)

    def _predict(self, context: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Layer-normalized predictions: (B, K, D), (B, K) and (B, M, L) -> (B, M, L, D)."""
        predicted = self.predictor(context, visible, hidden)
        return predicted if self.predicts_normalized else layer_norm(predicted)

    @torch.no_grad()
    def decode(self, embeddings: Tensor) -> Tensor:
        """Normalized pixels (B, 3, H, W) of patch embeddings (B, N, D), true or predicted ones."""
        return self.decoders["jepa"](layer_norm(embeddings))

    @torch.no_grad()
    def complete(self, images: Tensor, generator: torch.Generator) -> Completion:
        """Hide blocks of images, predict their features, and decode.

        Args:
            images: Normalized images, (B, 3, H, W).
            generator: Random generator of the masks, on the CPU.
        """
        masks = self.masks.draw(len(images), generator, 1.0).to(images.device)
        count = self.encoder.grid[0] * self.encoder.grid[1]
        visible = torch.zeros(len(images), count, dtype=torch.bool, device=images.device).scatter_(1, masks.context, True)
        targets = torch.zeros_like(visible).scatter_(1, masks.targets.flatten(1), True)
        context = self.context_encoder(images, masks.context)  # (B, K, D)
        # All that is not seen is predicted at once, as IWM is trained, and then each block on its own, as I-JEPA is.
        rest = masks.hidden(count)  # (B, N - K)
        blocks = masks.targets if self.apply_actions is None else masks.targets[:, :0]
        features = images.new_zeros(len(images), count, self.encoder.dim)
        predicted = [self._predict(context, masks.context, rest[:, None])[:, 0]]  # (B, N - K, D)
        if blocks.shape[1]:
            predicted += self._predict(context, masks.context, blocks).unbind(1)  # M of (B, L, D)
        places = [rest, *blocks.unbind(1)]
        normalized = layer_norm(context)
        # One after the other, since blocks may overlap: the last one counts.
        for indices, values in zip([masks.context, *places], [normalized, *predicted], strict=True):
            features.scatter_(1, indices[..., None].expand(-1, -1, self.encoder.dim), values.to(features.dtype))
        decoder = self.decoders["jepa"]
        return Completion(visible, targets, decoder(features), decoder(self.features(images)))

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        losses = {}
        for name, decoder in self.decoders.items():
            losses[name] = F.mse_loss(decoder(self.features(batch.images, name)), batch.images)  # type: ignore[arg-type]
        self.log_dict({f"train/mse_{name}": loss for name, loss in losses.items()}, prog_bar=True)
        return torch.stack(list(losses.values())).sum()  # they share no parameter, so each is trained on its own

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        images = batch.images
        found = self.complete(images, batch_generator(batch))
        truth = self.decoders["jepa"].patches(images)  # (B, N, pixels)
        mean = take(truth, found.visible.nonzero()[:, 1].view(len(images), -1)).unflatten(2, (3, -1)).mean(dim=(1, 3))
        decoded = {
            "reconstruction": found.reconstructed,
            "completion": found.completed,
            "untrained_reconstruction": self.decoders["untrained"](self.features(images, "untrained")),
            "mean_color": mean[..., None, None].expand_as(images),
        }
        for name, pixels in decoded.items():
            error = (self.decoders["jepa"].patches(pixels) - truth).square().mean(dim=2)  # (B, N)
            self.errors[name].update(error[found.targets].mean(), len(images))
        if batch_idx == 0:
            self._show(images[:SHOWN], Completion(*(part[:SHOWN] for part in found)))

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def _figures(self) -> dict[str, float]:
        figures = {}
        for name, metric in self.errors.items():
            figures[name] = float(metric.compute())
            metric.reset()
        return figures

    def on_validation_epoch_end(self) -> None:
        figures = self._figures()
        self.log_dict({f"val/hidden_mse_{name}": value for name, value in figures.items()})
        self.log("val/loss", figures["reconstruction"], prog_bar=True)

    def on_test_epoch_end(self) -> None:
        figures = self._figures()
        if not self.trainer.is_global_zero:
            return
        rows = [f"| {title} | {figures[name]:.4f} |" for name, title in self.titles.items()]
        table = "\n".join(["| hidden blocks | squared error, normalized pixels |", "| :-- | --: |", *rows])
        report = {"hidden_mse": figures, "checkpoint": self.checkpoint}
        notes = f"Of `{self.checkpoint}`, on the target blocks of held-out images. Figure: completion.png."
        save_report(Path(self.trainer.default_root_dir), report, "Completion", notes, table)

    def _show(self, images: Tensor, found: Completion) -> None:
        """Write completion.png and show the same figure."""
        if not self.trainer.is_global_zero or self.trainer.sanity_checking or self.trainer.fast_dev_run:
            return
        shown = to_colors(images, self.pixels)
        seen = hide_patches(shown, ~found.visible, self.encoder.grid)
        figure = rows_figure(
            {
                "image": shown,
                "visible": seen,
                "completed": to_colors(found.completed, self.pixels),
                "true features": to_colors(found.reconstructed, self.pixels),
            }
        )
        directory = Path(self.trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        figure.savefig(directory / "completion.png")
        show(self.trainer, "completion", figure, self.global_step)
        if self.apply_actions is not None:
            action_sweep = self._action_sweep(images[:1])
            action_sweep.savefig(directory / "action_sweep.png")
            show(self.trainer, "action_sweep", action_sweep, self.global_step)

    @torch.no_grad()
    def _action_sweep(self, image: Tensor) -> Figure:
        """What actions of one scalar make of a normalized image (1, 3, H, W): the truth, and decoded predictions."""
        assert self.apply_actions is not None
        context = self.context_encoder(image)  # (1, N, D)
        rows = {}
        for number, name in enumerate(JITTERED):
            colors = torch.zeros(STEPS, len(COLORS))
            colors[:, number] = torch.linspace(-1, 1, STEPS)
            predicted = self.apply_actions(context.expand(STEPS, -1, -1), action_to(colors, self.views).to(image.device))
            if not self.predicts_normalized:
                predicted = layer_norm(predicted)
            rows[f"{name},\ntrue"] = to_colors(
                make_versions(denormalize(image, self.pixels)[0], colors, self.pixels), self.pixels
            )
            rows[f"{name},\npredicted"] = to_colors(self.decoders["jepa"](predicted), self.pixels)
        return rows_figure(rows)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups = parameter_groups([self.decoders], self.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        schedule = warmup_cosine_schedule(optimizer, total_optimizer_steps(self.trainer), 0.05)
        return {"optimizer": optimizer, "lr_scheduler": schedule}
