"""Evaluation of an image world model by predictor fine-tuning (Garrido et al. 2024).

Shapes: B batch, N patches, H W pixels, D embedding dimension.
"""

import copy
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy

from callbacks.schedules import total_optimizer_steps
from datamodules.batches import ImageBatch
from jepa_lightning.image_jepa import ImageJEPA
from jepa_lightning.iwm import IWM
from jepa_lightning.networks.masked_predictor import WorldModel
from jepa_lightning.optim import parameter_groups, warmup_cosine_schedule
from jepa_lightning.probes.baselines import BASELINE_SEED
from jepa_lightning.probes.images.attentive import AttentivePool
from jepa_lightning.probes.images.base import ImageProbe
from jepa_lightning.probes.images.finetuning import arm_accuracies
from jepa_lightning.probes.report import save_accuracies

ONLY = "labels"
"""Name of the task where there is but one."""


class AttentiveClassifier(nn.Module):
    """Attention over patch features, a query and a linear layer for each task."""

    def __init__(self, dim: int, num_heads: int, tasks: dict[str, int]) -> None:
        super().__init__()
        heads = {f"task_{name}": AttentivePool(dim, num_heads, classes) for name, classes in tasks.items()}
        self.heads = nn.ModuleDict(heads)  # with a prefix: some names are methods of a ModuleDict

    def forward(self, tokens: Tensor, task: str) -> Tensor:
        """(B, N, D) -> (B, classes)."""
        return self.heads[f"task_{task}"](tokens)


class PredictorClassifier(AttentiveClassifier):
    """A predictor of the whole, unchanged image, and attentive classifiers of its output.

    Where there are several tasks, each has a learned token that the predictor sees.
    """

    def __init__(self, predictor: WorldModel, dim: int, num_heads: int, tasks: dict[str, int]) -> None:
        super().__init__(dim, num_heads, tasks)
        self.predictor = predictor
        width = predictor.mask_token.shape[-1]
        names = tasks if len(tasks) > 1 else {}
        self.tokens = nn.ParameterDict({f"{name}_token": 0.02 * torch.randn(1, width) for name in names})

    def forward(self, tokens: Tensor, task: str) -> Tensor:
        """(B, N, D) -> (B, classes)."""
        named = self.tokens[f"{task}_token"] if len(self.tokens) else None
        return super().forward(self.predictor.predict_all(tokens, further=named), task)


class PredictorFineTuning(ImageProbe):
    """Fine-tune the predictor of an IWM on labels: the encoder stays frozen and cheap to share.

    The predictor sees the frozen encoder's features of the whole image and predicts all patches after no change (the zero
    action); an attentive classifier reads its output. Three arms see the same images: the pre-trained predictor, one of
    the same size with random weights, and the attentive classifier alone. `test` writes report.json and report.md.

    With `datamodules.MultiTask`, one predictor learns several tasks at once, each with a token and a classifier of its own.

    Args:
        checkpoint: Path of the checkpoint of an IWM, written by `fit`.
        num_classes: Number of classes of the data; by task where there are several.
        end_to_end: Train the encoder too, a copy of its own for each arm.
        learning_rate: Peak learning rate of the classifiers, and of the predictor with random weights.
        pretrained_factor: Learning rate of the pre-trained predictor, and of an encoder, over `learning_rate`; the paper's
            is a tenth.
        warmup_fraction: Fraction of all optimizer steps over which the learning rates rise, in [0, 1).
        weight_decay: Weight decay of matrices.
        label_smoothing: Fraction of the target that all classes share, in [0, 1).

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, holds no IWM, or an argument is out of its range.
    """

    several_tasks = True
    titles = {  # noqa: RUF012
        "pretrained": "pre-trained predictor",
        "random": "predictor with random weights",
        "attentive": "no predictor: attention over the patches",
    }

    any_size = False

    def __init__(
        self,
        checkpoint: str,
        num_classes: int | dict[str, int] | None = None,
        end_to_end: bool = False,
        learning_rate: float = 1e-3,
        pretrained_factor: float = 0.1,
        warmup_fraction: float = 0.1,
        weight_decay: float = 0.05,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(checkpoint, "target", num_classes)
        self.save_hyperparameters()
        if not learning_rate > 0 or not 0 < pretrained_factor <= 1:
            raise ValueError(
                f"model.learning_rate={learning_rate}, model.pretrained_factor={pretrained_factor}: the first must be "
                "positive, the second lies in (0, 1]."
            )
        if not 0 <= label_smoothing < 1 or not 0 <= warmup_fraction < 1 or not weight_decay >= 0:
            raise ValueError(
                f"model.label_smoothing={label_smoothing}, model.warmup_fraction={warmup_fraction}, "
                f"model.weight_decay={weight_decay}: the first two lie in [0, 1), the last is >= 0."
            )
        self.learning_rate, self.pretrained_factor, self.warmup_fraction = learning_rate, pretrained_factor, warmup_fraction
        self.weight_decay, self.label_smoothing = weight_decay, label_smoothing
        self.end_to_end = end_to_end
        if num_classes is not None:
            self.set_classes(num_classes)

    def set_classes(self, num_classes: int | dict[str, int]) -> None:
        super().set_classes(num_classes)
        self.tasks = num_classes if isinstance(num_classes, dict) else {ONLY: num_classes}
        if odd := [name for name in self.tasks if not name.isidentifier()]:
            raise ValueError(f"model.num_classes: {odd[0]!r} is no name for a task; use letters, digits and underscores.")
        self.names = {
            self._kind(arm, task): title if task == ONLY else f"{task}: {title}"
            for task in self.tasks
            for arm, title in self.titles.items()
        }
        sizes = (self.encoder.dim, self.encoder.num_heads, self.tasks)
        pretrained = copy.deepcopy(self.predictor).requires_grad_(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(BASELINE_SEED)
            self.arms = nn.ModuleDict(
                {
                    "pretrained": PredictorClassifier(pretrained, *sizes),
                    "random": PredictorClassifier(self.build_predictor(), *sizes),
                    "attentive": AttentiveClassifier(*sizes),
                }
            )
        self.encoders = nn.ModuleDict()
        if self.end_to_end:
            self.encoders.update({name: copy.deepcopy(self.encoder).requires_grad_(True) for name in self.titles})
        self.accuracies = nn.ModuleDict(
            {
                self._kind(arm, task): MulticlassAccuracy(classes, average="micro")
                for task, classes in self.tasks.items()
                for arm in self.titles
            }
        )
        self.evaluated = nn.ModuleDict({f"task_{task}": SumMetric() for task in self.tasks})

    def _kind(self, arm: str, task: str) -> str:
        return arm if task == ONLY else f"{arm}_{task}"

    def take(self, jepa: ImageJEPA) -> None:
        if not isinstance(jepa, IWM):
            raise ValueError(f"{self.checkpoint} holds a {type(jepa).__name__}; PredictorFineTuning needs an IWM.")
        self.predictor, self.build_predictor = jepa.predictor, jepa.build_predictor

    def logits(self, images: Tensor, task: str = ONLY) -> dict[str, Tensor]:
        """Logits of every arm, from normalized images (B, 3, H, W): (B, classes) each."""
        if self.encoders:
            return {name: arm(self.encoders[name](images), task) for name, arm in self.arms.items()}
        with torch.no_grad():
            tokens = self.encoder(images)  # (B, N, D)
        return {name: arm(tokens, task) for name, arm in self.arms.items()}

    def training_step(self, batch: ImageBatch | dict[str, ImageBatch], batch_idx: int) -> Tensor:
        losses = {}
        for task, part in ({ONLY: batch} if isinstance(batch, ImageBatch) else batch).items():
            for arm, logits in self.logits(part.images, task).items():
                loss = F.cross_entropy(logits, part.labels, label_smoothing=self.label_smoothing)
                losses[self._kind(arm, task)] = loss
        self.log_dict({f"train/loss_{kind}": loss for kind, loss in losses.items()}, prog_bar=len(self.tasks) == 1)
        return torch.stack(list(losses.values())).sum()  # the arms share no parameter, so each is trained on its own

    def validation_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        data: Any = self.trainer.datamodule
        task = list(data.num_classes)[dataloader_idx] if len(self.tasks) > 1 else ONLY
        self.evaluated[f"task_{task}"].update(len(batch.labels))
        for arm, logits in self.logits(batch.images, task).items():
            self.accuracies[self._kind(arm, task)].update(logits, batch.labels)

    def test_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)

    def _figures(self) -> tuple[dict[str, dict[str, float]], str]:
        """Accuracies by arm and task, and on how many images."""
        figures: dict[str, dict[str, float]] = {}
        counts = []
        for task in self.tasks:
            kinds = [self._kind(arm, task) for arm in self.titles]
            found, count = arm_accuracies({kind: self.accuracies[kind] for kind in kinds}, self.evaluated[f"task_{task}"])
            figures |= found
            counts.append(str(count))
        return figures, ", ".join(counts)

    def on_validation_epoch_end(self) -> None:
        figures, _ = self._figures()
        self.log_dict({f"val/accuracy_{kind}": found["accuracy"] for kind, found in figures.items()}, prog_bar=True)
        pretrained = [found["accuracy"] for kind, found in figures.items() if kind.startswith("pretrained")]
        self.log("val/loss", 1 - sum(pretrained) / len(pretrained))  # the best checkpoint is the one with fewest errors

    def on_test_epoch_end(self) -> None:
        figures, counts = self._figures()
        save_accuracies(self, figures, f"on {counts} held-out images")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        slow = self.learning_rate * self.pretrained_factor
        pretrained: Any = self.arms["pretrained"]
        parts = [
            ("pretrained_predictor", pretrained.predictor, slow),
            ("pretrained_heads", pretrained.heads, self.learning_rate),
            ("pretrained_tokens", pretrained.tokens, self.learning_rate),
            ("random", self.arms["random"], self.learning_rate),
            ("attentive", self.arms["attentive"], self.learning_rate),
            ("encoders", self.encoders, slow),
        ]
        groups = []
        for name, module, rate in parts:
            for group in parameter_groups([module], self.weight_decay):
                if group["params"]:
                    groups.append(group | {"name": f"{name}_{group['name']}", "lr": rate})
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        schedule = warmup_cosine_schedule(optimizer, total_optimizer_steps(self.trainer), self.warmup_fraction)
        return {"optimizer": optimizer, "lr_scheduler": schedule}
