"""Evaluation of the frozen encoder: what each pixel shows, read from the patch embeddings by a small head.

Shapes: B batch, N patches, C classes, H W pixels, h w patches, D embedding dimension, I images.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from matplotlib import colormaps
from torch import Tensor, nn
from torch.nn import functional as F

from callbacks.schedules import total_optimizer_steps
from datamodules.batches import VOID, SegmentationBatch
from jepa_lightning.figures import rows_figure, show, to_colors
from jepa_lightning.intersection_over_union import (
    ImageConfusions,
    bootstrapped,
    intersection_over_union,
    mean_iou,
)
from jepa_lightning.networks.vit import ViTEncoder
from jepa_lightning.optim import parameter_groups, warmup_cosine_schedule
from jepa_lightning.probes.images.base import ImageProbe
from jepa_lightning.probes.report import save_report

SHOWN = 6

ARMS = {
    "linear_last": "linear, last block",
    "linear_last_four": "linear, last four blocks",
    "conv_last_four": "convolutional, last four blocks",
    "untrained_linear_last": "randomly initialized encoder, linear, last block",
    "untrained_linear_last_four": "randomly initialized encoder, linear, last four blocks",
    "untrained_conv_last_four": "randomly initialized encoder, convolutional, last four blocks",
    "linear_colors": "colors and place of each patch, linear",
    "conv_colors": "colors and place of each patch, convolutional",
}
"""Heads and what they are put on, and how reports call them."""


class SegmentationHead(nn.Module):
    """A normalization and one or two convolutions, whose output is enlarged to pixels: (B, D, h, w) -> (B, C, H, W).

    Args:
        dim: Number of input channels D.
        num_classes: Number of classes C.
        width: Channels of a 3 x 3 convolution before the 1 x 1; None for a linear head.
    """

    def __init__(self, dim: int, num_classes: int, width: int | None) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.BatchNorm2d(dim, affine=False)]
        if width is not None:
            layers += [nn.Conv2d(dim, width, 3, padding=1), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(dim if width is None else width, num_classes, 1))

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits of all pixels of images of H x W pixels."""
        return F.interpolate(self.layers(features), size, mode="bilinear", align_corners=False)


class SegmentationProbe(ImageProbe):
    """Semantic segmentation from frozen patch embeddings: linear and small convolutional heads.

    All heads are trained together on the same images, each as if it were alone: on the last block, on the last four blocks,
    and, as baselines, on the randomly initialized encoder and on the pixels of each patch with its place. Images may be of
    another size than in pre-training: the positions are stretched. `test` writes report.json, report.md and
    segmentation.png: mean and per-class intersection over union (IoU) on the held-out images, in pixels of
    `data.image_size`, with bootstrap standard errors over images.

    Args:
        checkpoint: Path of a run directory or checkpoint of an I-JEPA or IWM, or of weights in the layout of the released
            I-JEPA, of timm or of Hugging Face.
        num_classes: Number of classes; that of the data by default.
        encoder: Which encoder's embeddings are read, "target" or "context".
        width: Channels of the convolutional heads.
        learning_rate: Peak learning rate.
        weight_decay: Weight decay of the heads' kernels.
        baselines: Whether to evaluate the randomly initialized encoder and the pixels, too.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, holds no such model, or an argument is out of its range.
    """

    names = ARMS
    own = ("linear_last", "linear_last_four", "conv_last_four")
    batch_type = SegmentationBatch

    def __init__(
        self,
        checkpoint: str,
        num_classes: int | None = None,
        encoder: Literal["target", "context"] = "target",
        width: int = 128,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        baselines: bool = True,
    ) -> None:
        super().__init__(checkpoint, encoder, num_classes, baselines)
        self.save_hyperparameters()
        if width < 1 or not learning_rate > 0 or not weight_decay >= 0:
            raise ValueError(
                f"model.width={width}, model.learning_rate={learning_rate}, model.weight_decay={weight_decay}: give a width "
                "of 1 or more, a positive rate and a weight decay >= 0."
            )
        self.width, self.learning_rate, self.weight_decay = width, learning_rate, weight_decay
        if num_classes is not None:
            self.set_classes(num_classes)

    def set_classes(self, num_classes: int | dict[str, int]) -> None:
        assert isinstance(num_classes, int)
        super().set_classes(num_classes)
        self.heads = nn.ModuleDict(
            {
                name: SegmentationHead(self._dim(name), num_classes, self.width if "conv" in name else None)
                for name in self.names
            }
        )
        self.confusions = nn.ModuleDict({name: ImageConfusions(num_classes) for name in self.names})

    def _dim(self, name: str) -> int:
        if name.endswith("colors"):
            return self.channels * self.encoder.patch_size**2 + self.encoder.dim
        return self.encoder.dim * (min(4, len(self.encoder.vit.blocks)) if name.endswith("four") else 1)

    @torch.no_grad()
    def features(self, images: Tensor) -> dict[str, Tensor]:
        """What the heads are put on, by the end of their names: normalized images (B, C, H, W) -> (B, D, h, w) each."""
        found = self._maps(self.encoder, images, "")
        if self.baselines:
            size = self.encoder.patch_size
            patches = F.unfold(images, size, stride=size).unflatten(2, self.encoder.grid)  # (B, C * size^2, h, w)
            places = self.encoder.positions.T.unflatten(1, self.encoder.grid).expand(len(images), -1, -1, -1)
            found |= self._maps(self.untrained, images, "untrained_") | {"colors": torch.cat([patches, places], dim=1)}
        return found

    def _maps(self, encoder: ViTEncoder, images: Tensor, prefix: str) -> dict[str, Tensor]:
        blocks = encoder.last_blocks(images, 4)
        maps = [block.float().transpose(1, 2).unflatten(2, encoder.grid) for block in blocks]  # (B, D, h, w) each
        return {f"{prefix}last": maps[-1], f"{prefix}last_four": torch.cat(maps, dim=1)}

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of all pixels by head: normalized images (B, C, H, W) -> (B, classes, H, W) each."""
        features = self.features(images)
        found = {}
        for name, head in self.heads.items():
            what = name.replace("linear_", "").replace("conv_", "")
            found[name] = head(features[what], self.image_size)
        return found

    def training_step(self, batch: SegmentationBatch, batch_idx: int) -> Tensor:
        losses = {name: pixel_loss(scores, batch.masks) for name, scores in self.logits(batch.images).items()}
        self.log_dict({f"train/loss_{name}": loss for name, loss in losses.items()})
        total = torch.stack(list(losses.values())).sum()  # they share no parameter, so each is trained on its own
        self.log("train/loss", total / len(losses), prog_bar=True)
        return total

    def validation_step(self, batch: SegmentationBatch, batch_idx: int) -> None:
        logits = self.logits(batch.images)
        for name, scores in logits.items():
            self.confusions[name].update(scores.argmax(dim=1), batch.masks)
        loss = pixel_loss(logits["linear_last_four"], batch.masks)
        self.log("val/loss", loss, sync_dist=True, batch_size=len(batch.images))
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self._show(batch, logits)

    def test_step(self, batch: SegmentationBatch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        for name, metric in self.confusions.items():
            figure = mean_iou(metric.compute().sum(dim=0)).float()
            self.log(f"val/miou_{name}", figure, prog_bar=name == "linear_last_four")
            metric.reset()

    def on_test_epoch_end(self) -> None:
        confusions = {name: metric.compute() for name, metric in self.confusions.items()}
        for metric in self.confusions.values():
            metric.reset()
        if not self.trainer.is_global_zero:
            return
        count, num_classes = next(iter(confusions.values())).shape[:2]
        names = getattr(self.data, "class_names", None)
        report = segmentation_report(confusions, names or [str(number) for number in range(num_classes)])
        report |= {"checkpoint": self.checkpoint, "num_images": count}
        notes = (
            f"Of `{self.checkpoint}`, on {count} held-out images of {self.image_size[0]} x {self.image_size[1]} pixels. "
            "Mean intersection over union (IoU) over the classes; standard errors by bootstrap over images; the last column "
            "is the difference from the linear head on the last four blocks, on the same images. Figure: segmentation.png."
        )
        table = segmentation_table(report, self.names)
        save_report(Path(self.trainer.default_root_dir), report, "Segmentation", notes, table)

    def _show(self, batch: SegmentationBatch, logits: dict[str, Tensor]) -> None:
        """Write segmentation.png: images, what they show, and what three of the heads make of them."""
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run:
            return
        shown = to_colors(batch.images[:SHOWN], self.pixels)
        rows = {"image": shown, "truth": class_colors(batch.masks[:SHOWN])}
        for name in ("linear_last_four", "conv_last_four", "untrained_linear_last_four", "linear_colors"):
            if name in logits:
                title = name.replace("_last_four", "").replace("_", "\n")
                rows[title] = class_colors(logits[name][:SHOWN].argmax(dim=1))
        figure = rows_figure(rows)
        directory = Path(self.trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        figure.savefig(directory / "segmentation.png")
        show(self.trainer, "segmentation", figure, self.global_step)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups = parameter_groups([self.heads], self.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        schedule = warmup_cosine_schedule(optimizer, total_optimizer_steps(self.trainer), 0.05)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def pixel_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean cross-entropy of the pixels that count, 0 if none does: (B, C, H, W) and (B, H, W) -> scalar."""
    total = F.cross_entropy(logits.float(), masks, ignore_index=VOID, reduction="sum")
    return total / (masks != VOID).sum().clamp(min=1)


def class_colors(masks: Tensor) -> Tensor:
    """A color for each class, white for void: (B, H, W) -> (B, 3, H, W) in [0, 1]."""
    palette = torch.tensor([*colormaps["tab20"].colors, (1.0, 1.0, 1.0)])  # type: ignore[attr-defined]
    places = torch.where(masks == VOID, len(palette) - 1, masks % (len(palette) - 1)).cpu()
    return palette[places].movedim(-1, 1)


def segmentation_report(confusions: dict[str, Tensor], classes: list[str]) -> dict[str, Any]:
    """Figures by head: mean IoU, its standard error, IoU by class, and the difference from the main head with its error.

    Args:
        confusions: Confusion matrices of each image by head, (I, C, C).
        classes: Names of the classes.
    """
    drawn = {name: bootstrapped(matrices) for name, matrices in confusions.items()}
    main = "linear_last_four"
    found = {}
    for name, matrices in confusions.items():
        total = matrices.sum(dim=0)
        found[name] = {
            "miou": float(mean_iou(total)),
            "standard_error": float(drawn[name].std()),
            "difference": float(mean_iou(total) - mean_iou(confusions[main].sum(dim=0))),
            "difference_standard_error": float((drawn[name] - drawn[main]).std()),
            "iou": dict(zip(classes, intersection_over_union(total).tolist(), strict=True)),
        }
    return {"segmentation": found}


def segmentation_table(report: dict[str, Any], titles: dict[str, str]) -> str:
    """The figures of a `SegmentationProbe` in Markdown: a row for each head, then a row for each class."""
    found = report["segmentation"]
    lines = ["| head | mean IoU | standard error | difference (its standard error) |", "| :-- | --: | --: | --: |"]
    for name, figures in found.items():
        difference = f"{figures['difference']:+.3f} ({figures['difference_standard_error']:.3f})"
        lines.append(f"| {titles[name]} | {figures['miou']:.3f} | {figures['standard_error']:.3f} | {difference} |")
    lines += ["", "| IoU of | " + " | ".join(titles[name] for name in found) + " |", "| :-- |" + " --: |" * len(found)]
    for label in next(iter(found.values()))["iou"]:
        cells = [f"{figures['iou'][label]:.3f}" for figures in found.values()]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
