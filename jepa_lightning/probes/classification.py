"""Phase two, pictures: a linear classifier on frozen features, beside those on what it must beat.

Shapes: B batch, H W pixels, D width, G heads of the grid.
"""

import itertools
import json
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from callbacks.schedules import total_optimizer_steps
from datamodules.batches import ImageBatch
from jepa_lightning.checkpoints import load_jepa
from jepa_lightning.ijepa import IJEPA
from jepa_lightning.optim import warmup_cosine_schedule

CONTROL_SEED = 12345
PIXEL_GRID = 32
"""Pictures larger than this are shrunk to it for the control that sees pixels alone."""

NAMES = {
    "last": "average of the last block",
    "last_four": "averages of the last four blocks",
    "untrained_last": "untrained encoder, last block",
    "untrained_last_four": "untrained encoder, last four blocks",
    "pixels": "pixels",
}


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
        """Take in class indices of every classifier (B, count) and the right ones (B,); samples take turns."""
        right = predicted == labels[:, None]
        for half in (0, 1):
            self.right[half] += right[half::2].sum(dim=0)
            self.seen[half] += len(right[half::2])

    def compute(self) -> Tensor:
        """Accuracies on both halves: (2, count)."""
        return self.right / self.seen[:, None].clamp(min=1)


class LinearProbe(LightningModule):
    """Linear classifiers on frozen, average-pooled features: how good is a representation?

    Trained side by side in one pass, on the same pictures: classifiers on the last block and on the last four blocks
    (the paper reports the better), on the same network untrained, and on pixels; each of them, behind a batch
    normalisation, once per pair of learning rate and weight decay. The best pair is chosen on every other validation
    picture, and the accuracy reported is that on the rest. `test` writes report.json and report.md.

    Differs from the paper: momentum SGD with a cosine instead of LARS with steps, which was made for batches of 16,384.

    Args:
        checkpoint: Of an I-JEPA, written by `fit`.
        num_classes: Classes of the data.
        encoder: Whose features are read: the target encoder's, as in the paper, or the context encoder's.
        learning_rates: Peaks of the grid.
        weight_decays: Of the grid.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, holds no I-JEPA, or an argument is out of its range.
    """

    def __init__(
        self,
        checkpoint: str,
        num_classes: int = 10,
        encoder: Literal["target", "context"] = "target",
        learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1),
        weight_decays: tuple[float, ...] = (0.0, 5e-4),
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if num_classes < 2:
            raise ValueError(f"model.num_classes={num_classes}: a classifier needs at least 2 classes.")
        if not learning_rates or min(learning_rates) <= 0 or not weight_decays or min(weight_decays) < 0:
            raise ValueError(
                f"model.learning_rates={learning_rates}, model.weight_decays={weight_decays}: give at least one positive "
                "rate and one weight decay >= 0."
            )
        jepa = load_jepa(checkpoint)
        if not isinstance(jepa, IJEPA):
            raise ValueError(f"{checkpoint} holds a {type(jepa).__name__}; this probe reads an IJEPA.")
        if encoder not in ("target", "context"):
            raise ValueError(f"model.encoder={encoder!r}: choose 'target' or 'context'.")
        self.checkpoint, self.num_classes, self.image_size = checkpoint, num_classes, jepa.image_size
        self.encoder = jepa.target_encoder if encoder == "target" else jepa.context_encoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(CONTROL_SEED)
            self.untrained = jepa.build_encoder()
        for network in (self.encoder, self.untrained):
            network.requires_grad_(False).eval()
        self.grid = list(itertools.product(learning_rates, weight_decays))
        dim = self.untrained.dim
        depth = min(4, len(jepa.context_encoder.vit.blocks))
        pixels = 3 * min(PIXEL_GRID, self.image_size[0]) * min(PIXEL_GRID, self.image_size[1])
        widths = dict(zip(NAMES, (dim, depth * dim) * 2 + (pixels,), strict=True))
        self.norms = nn.ModuleDict({name: nn.BatchNorm1d(width, affine=False) for name, width in widths.items()})
        self.heads = nn.ModuleDict(
            {
                f"{name}_{place}": nn.Linear(width, num_classes)
                for name, width in widths.items()
                for place in range(len(self.grid))
            }
        )
        for name, parameter in self.heads.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=0.01)
        self.accuracy = HalvesAccuracy(len(widths) * len(self.grid))

    def train(self, mode: bool = True) -> "LinearProbe":
        """Switch to training mode, all but the frozen networks."""
        super().train(mode)
        self.encoder.eval()
        self.untrained.eval()
        return self

    def setup(self, stage: str) -> None:
        """Compare with the data module.

        Raises:
            ValueError: Other classes or pictures of another size than the probe was built for, or no classes at all.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        classes = getattr(data, "num_classes", self.num_classes)
        if classes != self.num_classes:
            raise ValueError(f"model.num_classes={self.num_classes} but the data has {classes} classes: set it to that.")
        theirs = getattr(data, "image_size", self.image_size)
        if tuple(theirs) != self.image_size:
            raise ValueError(f"The JEPA was trained on pictures of {self.image_size} pixels; data.image_size={theirs}.")

    @torch.no_grad()
    def features(self, images: Tensor) -> dict[str, Tensor]:
        """What the classifiers read, by name: normalised images (B, 3, H, W) -> (B, width) each."""
        found: dict[str, Tensor] = {}
        for prefix, network in (("", self.encoder), ("untrained_", self.untrained)):
            pooled = [tokens.mean(dim=1) for tokens in network.last_blocks(images, 4)]
            found[f"{prefix}last"], found[f"{prefix}last_four"] = pooled[-1], torch.cat(pooled, dim=1)
        size = [min(PIXEL_GRID, side) for side in self.image_size]
        found["pixels"] = F.adaptive_avg_pool2d(images, (size[0], size[1])).flatten(1)
        return found

    def logits(self, images: Tensor) -> Tensor:
        """Of every classifier, in the order of `NAMES` and the grid: (B, 5 G, classes)."""
        features = self.features(images)
        normalised = {name: self.norms[name](features[name].float()) for name in NAMES}
        scores = [self.heads[f"{name}_{place}"](normalised[name]) for name in NAMES for place in range(len(self.grid))]
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

    def chosen(self) -> dict[str, dict[str, float]]:
        """Accuracy, its standard error and the chosen pair of the grid, by name of the features."""
        choose, report = self.accuracy.compute().unflatten(1, (len(NAMES), len(self.grid)))  # (5, G) each
        count = max(1, int(self.accuracy.seen[1]))
        found = {}
        for row, name in enumerate(NAMES):
            best = int(choose[row].argmax())
            accuracy = float(report[row, best])
            rate, decay = self.grid[best]
            found[name] = {
                "accuracy": accuracy,
                "standard_error": (accuracy * (1 - accuracy) / count) ** 0.5,
                "learning_rate": rate,
                "weight_decay": decay,
            }
        return found

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            for name, figures in self.chosen().items():
                self.log(f"val/accuracy_{name}", figures["accuracy"], prog_bar=name == "last")
        self.accuracy.reset()

    def on_test_epoch_end(self) -> None:
        write_report(Path(self.trainer.default_root_dir), self.chosen(), self.checkpoint, int(self.accuracy.seen[1]))
        self.accuracy.reset()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups = [
            {
                "params": [p for name in NAMES for p in self.heads[f"{name}_{place}"].parameters()],
                "lr": rate,
                "weight_decay": decay,
                "name": f"{rate:g}_{decay:g}",
            }
            for place, (rate, decay) in enumerate(self.grid)
        ]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        schedule = warmup_cosine_schedule(optimizer, total_optimizer_steps(self.trainer), 0.0)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["class"] = type(self).__name__


def write_report(directory: Path, figures: dict[str, dict[str, float]], checkpoint: str, judged: int) -> None:
    """Write report.json and report.md, and print the table.

    Args:
        directory: The run directory.
        figures: Of `LinearProbe.chosen`.
        checkpoint: Of the JEPA.
        judged: Pictures that the accuracies were taken on.
    """
    command = shlex.join(["python", "-m", "jepa_lightning", *sys.argv[1:]])
    report = {
        "linear": {name: figures[name] for name in ("last", "last_four")},
        "baselines": {name: figures[name] for name in NAMES if name not in ("last", "last_four")},
        "judged_pictures": judged,
        "checkpoint": checkpoint,
        "command": command,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    rows = [
        f"| {title} | {figures[name]['accuracy']:.3f} | {figures[name]['standard_error']:.3f} | "
        f"{figures[name]['learning_rate']:g}, {figures[name]['weight_decay']:g} |"
        for name, title in NAMES.items()
    ]
    table = "\n".join(
        ["| features | accuracy | standard error | learning rate, weight decay |", "| :-- | --: | --: | --: |", *rows]
    )
    text = (
        f"# Linear probe\n\nOf `{checkpoint}`, on {judged} held-out pictures; learning rate and weight decay were chosen on "
        f"others.\n\n{table}\n\nMade by `{command}`.\n"
    )
    (directory / "report.md").write_text(text)
    print(f"\n{table}\n\n{directory / 'report.md'}")
