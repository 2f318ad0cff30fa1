"""Evaluation of the frozen encoder: classifiers on frozen embeddings, compared with the baselines that they must beat.

Shapes: B batch, H W pixels, N patches, D embedding dimension, G heads of the grid.
"""

import itertools
from abc import abstractmethod
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from callbacks.schedules import total_optimizer_steps
from datamodules.batches import ImageBatch
from jepa_lightning.networks.vit import ViTEncoder
from jepa_lightning.optim import warmup_cosine_schedule
from jepa_lightning.probes.images.base import ImageProbe
from jepa_lightning.probes.report import save_accuracies

PIXEL_GRID = 32
"""Images larger than this are shrunk to it for the baseline on pixels."""


def shrunk_pixels(images: Tensor) -> Tensor:
    """Images as vectors, large ones shrunk to `PIXEL_GRID`: (B, 3, H, W) -> (B, 3 h w)."""
    height, width = (min(PIXEL_GRID, side) for side in images.shape[-2:])
    return F.adaptive_avg_pool2d(images, (height, width)).flatten(1)


LINEAR_INPUTS = {
    "last": "average of the last block",
    "last_four": "averages of the last four blocks",
    "untrained_last": "randomly initialized encoder, last block",
    "untrained_last_four": "randomly initialized encoder, last four blocks",
    "pixels": "pixels",
}
"""What linear classifiers are put on, and how reports call it; the last three are baselines."""


@torch.no_grad()
def pooled_inputs(encoder: ViTEncoder, untrained: ViTEncoder | None, images: Tensor) -> dict[str, Tensor]:
    """What linear classifiers are put on, by name: normalized images (B, 3, H, W) -> (B, width) each.

    Args:
        encoder: The frozen encoder.
        untrained: The randomly initialized one; without it there are no baselines.
        images: Normalized images, (B, 3, H, W).
    """
    found: dict[str, Tensor] = {}
    for prefix, network in (("", encoder), ("untrained_", untrained)):
        if network is not None:
            pooled = [tokens.float().mean(dim=1) for tokens in network.last_blocks(images, 4)]
            found[f"{prefix}last"], found[f"{prefix}last_four"] = pooled[-1], torch.cat(pooled, dim=1)
    if untrained is not None:
        found["pixels"] = shrunk_pixels(images)
    return found


class HalvesAccuracy(Metric):
    """Accuracies of several classifiers, on two halves of the samples: one to choose by and one to report.

    Args:
        count: Number of classifiers.
    """

    full_state_update = False
    right: Tensor
    seen: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.add_state("right", torch.zeros(2, count, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Add class indices of every classifier (B, count) and the right ones (B,); samples take turns."""
        right = predicted == labels[:, None]
        for half in (0, 1):
            self.right[half] += right[half::2].sum(dim=0)
            self.seen[half] += len(right[half::2])

    def compute(self) -> tuple[Tensor, Tensor]:
        """Accuracies on both halves, (2, count), and how many samples each has, (2,)."""
        return self.right / self.seen[:, None].clamp(min=1), self.seen


class ClassificationProbe(ImageProbe):
    """Classifiers on several kinds of features, each once per pair of learning rate and weight decay.

    All are trained side by side in one pass, on the same images. The best pair is chosen on every other validation
    image, and the accuracy reported is that on the rest. A subclass names its features and builds the heads on them.
    """

    def __init__(
        self,
        checkpoint: str,
        num_classes: int | None,
        encoder: Literal["target", "context"],
        learning_rates: tuple[float, ...],
        weight_decays: tuple[float, ...],
        baselines: bool,
    ) -> None:
        super().__init__(checkpoint, encoder, num_classes, baselines)
        if not learning_rates or min(learning_rates) <= 0 or not weight_decays or min(weight_decays) < 0:
            raise ValueError(
                f"model.learning_rates={learning_rates}, model.weight_decays={weight_decays}: give at least one positive "
                "rate and one weight decay >= 0."
            )
        self.grid = list(itertools.product(learning_rates, weight_decays))
        self.accuracy = HalvesAccuracy(len(self.names) * len(self.grid))
        if num_classes is not None:
            self.set_classes(num_classes)

    def set_classes(self, num_classes: int | dict[str, int]) -> None:
        assert isinstance(num_classes, int)
        super().set_classes(num_classes)
        self.heads = nn.ModuleDict(
            {f"{name}_{place}": self.make_head(name, num_classes) for name in self.names for place in range(len(self.grid))}
        )

    @abstractmethod
    def make_head(self, name: str, num_classes: int) -> nn.Module:
        """A classifier on one kind of features."""

    @abstractmethod
    def inputs(self, images: Tensor) -> dict[str, Tensor]:
        """What the classifiers take, by kind of features, from normalized images (B, 3, H, W)."""

    @abstractmethod
    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Optimizer of all heads: a group per pair of the grid, with its own "lr" and "weight_decay"."""

    def logits(self, images: Tensor) -> Tensor:
        """Logits of every classifier, in the order of `names` and the grid: (B, names * G, classes)."""
        inputs = {name: value.float() for name, value in self.inputs(images).items()}
        # In float32 where it is evaluated: rounded to bfloat16, the scores of two classes are now and then the same.
        with torch.autocast(images.device.type, enabled=self.training and torch.is_autocast_enabled(images.device.type)):
            scores = [self.heads[f"{name}_{place}"](inputs[name]) for name in self.names for place in range(len(self.grid))]
        return torch.stack(scores, dim=1)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        logits = self.logits(batch.images)
        # A sum: each classifier is trained as if it were alone.
        labels = batch.labels[:, None].expand(-1, logits.shape[1])
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()) * logits.shape[1]
        self.log("train/loss", loss / logits.shape[1], prog_bar=True)
        return loss

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        logits = self.logits(batch.images)
        labels = batch.labels[:, None].expand(-1, logits.shape[1])
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        self.log("val/loss", loss, sync_dist=True, batch_size=len(logits))
        self.accuracy.update(logits.argmax(dim=-1), batch.labels)

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def chosen(self) -> tuple[dict[str, dict[str, float]], int]:
        """Accuracy, its standard error and the chosen pair of the grid, by kind of features; and on how many images."""
        accuracies, seen = self.accuracy.compute()
        choose, report = accuracies.unflatten(1, (len(self.names), len(self.grid)))  # (names, G) each
        count = max(1, int(seen[1]))
        found = {}
        for row, name in enumerate(self.names):
            best = int(choose[row].argmax())
            accuracy = float(report[row, best])
            rate, decay = self.grid[best]
            found[name] = {
                "accuracy": accuracy,
                "standard_error": (accuracy * (1 - accuracy) / count) ** 0.5,
                "learning_rate": rate,
                "weight_decay": decay,
            }
        return found, count

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            first = next(iter(self.names))
            for name, figures in self.chosen()[0].items():
                self.log(f"val/accuracy_{name}", figures["accuracy"], prog_bar=name == first)
        self.accuracy.reset()

    def on_test_epoch_end(self) -> None:
        figures, count = self.chosen()
        evaluated = f"on {count} held-out images; learning rate and weight decay were chosen on others"
        save_accuracies(self, figures, evaluated)
        self.accuracy.reset()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups = [
            {
                "params": [p for name in self.names for p in self.heads[f"{name}_{place}"].parameters()],
                "lr": rate,
                "weight_decay": decay,
                "name": f"{rate:g}_{decay:g}",
            }
            for place, (rate, decay) in enumerate(self.grid)
        ]
        optimizer = self.make_optimizer(groups)
        schedule = warmup_cosine_schedule(optimizer, total_optimizer_steps(self.trainer), 0.0)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class LinearProbe(ClassificationProbe):
    """Linear probing on frozen, average-pooled embeddings: how good is a representation?

    On the last block and on the last four blocks (the paper reports the better), on the randomly initialized encoder, and
    on pixels, each behind a batch normalization. `test` writes report.json and report.md.

    Differs from the paper: momentum SGD with a cosine instead of LARS with steps, which was made for batches of 16,384.

    Args:
        checkpoint: Path of the checkpoint of an I-JEPA or IWM, written by `fit` or imported.
        num_classes: Number of classes of the data.
        encoder: Which encoder's embeddings are read, "target" as in the paper, or "context".
        learning_rates: Peak learning rates of the grid.
        weight_decays: Weight decays of the grid.
        baselines: Whether to evaluate the randomly initialized encoder and pixels, too.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, holds no such model, or an argument is out of its range.
    """

    names = LINEAR_INPUTS
    own = ("last", "last_four")

    def __init__(
        self,
        checkpoint: str,
        num_classes: int | None = None,
        encoder: Literal["target", "context"] = "target",
        learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1),
        weight_decays: tuple[float, ...] = (0.0, 5e-4),
        baselines: bool = True,
    ) -> None:
        super().__init__(checkpoint, num_classes, encoder, learning_rates, weight_decays, baselines)
        self.save_hyperparameters()

    def set_size(self, image_size: tuple[int, int]) -> None:
        before = self._width("pixels")
        super().set_size(image_size)
        # Of images smaller than `PIXEL_GRID` the baseline on pixels depends on their size.
        if self.baselines and self.num_classes is not None and before != self._width("pixels") and not self.fitted:
            self.set_classes(self.num_classes)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As for all probes.

        Raises:
            ValueError: The baseline on pixels was fitted to smaller images than those of the data, or to larger ones.
        """
        super().on_load_checkpoint(checkpoint)
        theirs = checkpoint["state_dict"].get("norms.pixels.running_mean")
        if theirs is not None and self.baselines and len(theirs) != self._width("pixels"):
            raise ValueError(
                f"The baseline on pixels was fitted to images of {tuple(checkpoint['image_size'])} pixels, and the data's "
                f"have {self.image_size}: set data.image_size to what it was fitted to."
            )

    def set_classes(self, num_classes: int | dict[str, int]) -> None:
        super().set_classes(num_classes)
        self.norms = nn.ModuleDict({name: nn.BatchNorm1d(self._width(name), affine=False) for name in self.names})

    def _width(self, name: str) -> int:
        if name == "pixels":
            return self.channels * min(PIXEL_GRID, self.image_size[0]) * min(PIXEL_GRID, self.image_size[1])
        depth = min(4, len(self.encoder.vit.blocks)) if name.endswith("four") else 1
        return depth * self.encoder.dim

    def make_head(self, name: str, num_classes: int) -> nn.Module:
        head = nn.Linear(self._width(name), num_classes)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        return head

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Pooled embeddings and pixels, by name: normalized images (B, 3, H, W) -> (B, width) each."""
        return pooled_inputs(self.encoder, self.untrained if self.baselines else None, images)

    def inputs(self, images: Tensor) -> dict[str, Tensor]:
        return {name: self.norms[name](value.float()) for name, value in self.features(images).items()}

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)
