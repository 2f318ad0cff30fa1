"""Evaluation of the encoder by end-to-end fine-tuning with labels."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy

from callbacks.schedules import total_optimizer_steps
from datamodules.batches import ImageBatch
from jepa_lightning.networks.vit import ViTEncoder
from jepa_lightning.optim import warmup_cosine_schedule
from jepa_lightning.probes.images.base import ImageProbe
from jepa_lightning.probes.report import save_accuracies


def arm_accuracies(accuracies: Mapping[str, Any], evaluated: Any) -> tuple[dict[str, dict[str, float]], int]:
    """Accuracy and its standard error by arm, and how many images were evaluated; the metrics are reset."""
    count = max(1, int(evaluated.compute()))
    evaluated.reset()
    figures = {}
    for name, metric in accuracies.items():
        accuracy = float(metric.compute())
        figures[name] = {"accuracy": accuracy, "standard_error": (accuracy * (1 - accuracy) / count) ** 0.5}
        metric.reset()
    return figures, count


class EncoderClassifier(nn.Module):
    """An encoder, its patches averaged, and a linear layer."""

    def __init__(self, encoder: ViTEncoder, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, classes)."""
        return self.head(self.encoder(images).mean(dim=1))


class FineTuning(ImageProbe):
    """Fine-tune an I-JEPA's encoder and a linear layer on labels, compared with the same network from scratch.

    Both see the same images for the same number of steps. Blocks nearer to the pixels learn more slowly, by
    `layer_decay` a block; from scratch, all learn alike. `test` writes report.json and report.md. (Assran et al. 2023,
    appendix A and D; they take 50 or 100 epochs and stronger augmentation.)

    Args:
        checkpoint: Path of the checkpoint of an I-JEPA or IWM, written by `fit` or imported.
        num_classes: Number of classes of the data.
        encoder: Which encoder is fine-tuned, "target" or "context".
        learning_rate: Peak learning rate of the linear layer and the last block.
        warmup_fraction: Fraction of all optimizer steps over which the learning rate rises, in [0, 1).
        layer_decay: Learning rate of a block over that of the next, in (0, 1].
        weight_decay: Weight decay of matrices.
        label_smoothing: Fraction of the target that all classes share, in [0, 1).

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, holds no such model, or an argument is out of its range.
    """

    names = {"finetuned": "fine-tuned", "scratch": "the same network from scratch"}  # noqa: RUF012

    def __init__(
        self,
        checkpoint: str,
        num_classes: int | None = None,
        encoder: Literal["target", "context"] = "target",
        learning_rate: float = 1e-3,
        warmup_fraction: float = 0.1,
        layer_decay: float = 0.75,
        weight_decay: float = 0.05,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__(checkpoint, encoder, num_classes)
        self.save_hyperparameters()
        if not learning_rate > 0:
            raise ValueError(f"model.learning_rate={learning_rate}: must be positive.")
        if not 0 < layer_decay <= 1:
            raise ValueError(f"model.layer_decay={layer_decay}: choose a factor in (0, 1].")
        if not 0 <= label_smoothing < 1 or not 0 <= warmup_fraction < 1 or not weight_decay >= 0:
            raise ValueError(
                f"model.label_smoothing={label_smoothing}, model.warmup_fraction={warmup_fraction}, "
                f"model.weight_decay={weight_decay}: the first two lie in [0, 1), the last is >= 0."
            )
        self.learning_rate, self.warmup_fraction, self.layer_decay = learning_rate, warmup_fraction, layer_decay
        self.weight_decay, self.label_smoothing = weight_decay, label_smoothing
        self.evaluated = SumMetric()
        if num_classes is not None:
            self.set_classes(num_classes)

    def set_size(self, image_size: tuple[int, int]) -> None:
        super().set_size(image_size)
        if self.num_classes is not None:
            self.networks["finetuned"].encoder, self.networks["scratch"].encoder = self.encoder, self.untrained

    def set_classes(self, num_classes: int | dict[str, int]) -> None:
        assert isinstance(num_classes, int)
        super().set_classes(num_classes)
        self.networks = nn.ModuleDict(
            {
                "finetuned": EncoderClassifier(self.encoder, num_classes),
                "scratch": EncoderClassifier(self.untrained, num_classes),
            }
        ).requires_grad_(True)
        self.accuracies = nn.ModuleDict({name: MulticlassAccuracy(num_classes, average="micro") for name in self.names})
        self.train()

    def train(self, mode: bool = True) -> "FineTuning":
        """Switch all to training mode: here nothing is frozen."""
        super().train(mode)
        if self.num_classes is not None:
            self.networks.train(mode)
        return self

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        losses = {
            name: F.cross_entropy(network(batch.images), batch.labels, label_smoothing=self.label_smoothing)
            for name, network in self.networks.items()
        }
        self.log_dict({f"train/loss_{name}": loss for name, loss in losses.items()}, prog_bar=True)
        return torch.stack(list(losses.values())).sum()  # they share no parameter, so each is trained on its own

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self.evaluated.update(len(batch.labels))
        for name, network in self.networks.items():
            logits = network(batch.images)
            self.accuracies[name].update(logits, batch.labels)
            if name == "finetuned":
                self.log("val/loss", F.cross_entropy(logits, batch.labels), sync_dist=True, batch_size=len(logits))

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        for name, figures in arm_accuracies(dict(self.accuracies.items()), self.evaluated)[0].items():
            self.log(f"val/accuracy_{name}", figures["accuracy"], prog_bar=True)

    def on_test_epoch_end(self) -> None:
        figures, count = arm_accuracies(dict(self.accuracies.items()), self.evaluated)
        save_accuracies(self, figures, f"on {count} held-out images")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups: list[dict[str, Any]] = []
        for name, network in self.networks.items():
            decay = self.layer_decay if name == "finetuned" else 1.0
            vit: Any = network.encoder.vit
            for number, group in enumerate(param_groups_layer_decay(vit, self.weight_decay, layer_decay=decay)):
                rate = self.learning_rate * group["lr_scale"]
                group = {key: group[key] for key in ("params", "weight_decay")}
                groups.append(group | {"lr": rate, "name": f"{name}_{number}"})
            head, rate = network.head, {"lr": self.learning_rate}
            groups.append({"params": [head.weight], "weight_decay": self.weight_decay, "name": f"{name}_head"} | rate)
            groups.append({"params": [head.bias], "weight_decay": 0.0, "name": f"{name}_head_bias"} | rate)
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=self.weight_decay)
        schedule = warmup_cosine_schedule(optimizer, total_optimizer_steps(self.trainer), self.warmup_fraction)
        return {"optimizer": optimizer, "lr_scheduler": schedule}
