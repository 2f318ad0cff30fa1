"""Evaluation of the frozen encoder: the linear probe in closed form, which leaves nothing to converge.

Shapes: B batch, H W pixels, D embedding dimension, C classes.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torchmetrics import SumMetric

from datamodules.batches import ImageBatch
from jepa_lightning.classifiers import RidgeClassifier, classify
from jepa_lightning.probes.images.base import ImageProbe
from jepa_lightning.probes.images.linear import LINEAR_INPUTS, pooled_inputs
from jepa_lightning.probes.images.training_features import encoded, training_share
from jepa_lightning.probes.report import save_accuracies

MAX_CHOOSING = 20_000
"""Maximum number of training images that the penalty is chosen on."""

MIN_CHOOSING, FEW_PENALTY = 20, 0.01
"""Minimum number of them, and the penalty where there are fewer: a handful says nothing."""


class RidgeProbe(ImageProbe):
    """Linear probing in closed form: ridge regression of the classes on frozen, average-pooled embeddings.

    There is nothing to fit by gradient descent, so that all kinds of features have the best linear map that they can have,
    after one pass over the training images without crops: `test` alone does it all and writes report.json and report.md.
    The penalty is chosen, for each kind of features, on every tenth training image, and the map is then fitted anew on all
    of them; held-out images are only reported on. With fewer than 200 training images it is the one nearest to 0.01.
    Features and baselines are those of `LinearProbe`.

    Differs from the paper: squared error of one-hot classes instead of cross-entropy, and no crops.

    Processes share the training images out among them and add up their sums, (1 + D)^2 numbers of 8 bytes.

    Args:
        checkpoint: Path of the checkpoint of an I-JEPA or IWM, written by `fit` or imported.
        num_classes: Number of classes of the data.
        encoder: Which encoder's embeddings are read, "target" as in the paper, or "context".
        penalties: Ridge penalties to choose from, relative to the variance of a dimension.
        baselines: Whether to evaluate the randomly initialized encoder and pixels, too.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, holds no such model, or an argument is out of its range.
    """

    names = LINEAR_INPUTS
    own: tuple[str, ...] = ("last", "last_four")
    needs_fit = False

    def __init__(
        self,
        checkpoint: str,
        num_classes: int | None = None,
        encoder: Literal["target", "context"] = "target",
        penalties: tuple[float, ...] = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
        baselines: bool = True,
    ) -> None:
        super().__init__(checkpoint, encoder, num_classes, baselines)
        self.save_hyperparameters()
        if not penalties or min(penalties) <= 0:
            raise ValueError(f"model.penalties={penalties}: give at least one, all positive.")
        self.penalties = penalties
        self.right = nn.ModuleDict({name: SumMetric() for name in self.names})
        self.evaluated = SumMetric()

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Pooled embeddings and pixels, by name: normalized images (B, 3, H, W) -> (B, D) each."""
        return pooled_inputs(self.encoder, self.untrained if self.baselines else None, images)

    def on_test_start(self) -> None:
        """Fit on the training images, of which this process encodes its share."""
        loader, rank, num_ranks = training_share(self), self.trainer.global_rank, self.trainer.world_size
        every = max(10, -(-len(loader.dataset) * num_ranks // MAX_CHOOSING))  # type: ignore[arg-type]
        fits: dict[str, RidgeClassifier] = {}
        kept: dict[str, list[Tensor]] = {name: [] for name in self.names}
        kept_labels, seen = [], 0
        for features, labels in encoded(self, loader):
            # By their place among those of all processes: so it does not matter how many there are.
            chosen = (rank + num_ranks * torch.arange(seen, seen + len(labels), device=labels.device)) % every == every - 1
            seen += len(labels)
            self.keep(features, labels, len(loader.dataset))  # type: ignore[arg-type]
            for name, value in features.items():
                if name not in fits:
                    assert isinstance(self.num_classes, int)
                    fits[name] = RidgeClassifier(value.shape[1], self.num_classes, self.device)
                fits[name].update(value[~chosen], labels[~chosen])
                kept[name].append(value[chosen].float().cpu())
            kept_labels.append(labels[chosen])
        self._weights, self._penalties = {}, {}
        for name in self.names:
            self._weights[name], self._penalties[name] = self._fitted(fits.pop(name), kept.pop(name), kept_labels)

    def keep(self, features: dict[str, Tensor], labels: Tensor, count: int) -> None:
        """What a subclass does with each batch of the training images.

        Args:
            features: Embeddings by kind, (B, D).
            labels: Classes, (B,).
            count: Number of training images of this process.
        """

    def _fitted(self, fit: RidgeClassifier, kept: list[Tensor], kept_labels: list[Tensor]) -> tuple[Tensor, float]:
        """Weights (1 + D, C) with the penalty that does best on what was kept for it, and that penalty."""
        rest = RidgeClassifier(len(fit.moments) - 1, len(fit.class_sums), self.device)
        if self.trainer.world_size > 1:
            fit.reduce()
        right = torch.zeros(len(self.penalties), device=self.device)
        maps = [fit.weights(penalty) for penalty in self.penalties]
        for features, labels in zip(kept, kept_labels, strict=True):
            there = features.to(self.device)
            right += torch.stack([(classify(there, weights) == labels).sum() for weights in maps])
            rest.update(there, labels)
        if self.trainer.world_size > 1:
            rest.reduce()
        right = self.trainer.strategy.reduce(right, reduce_op="sum")
        count = int(rest.moments[0, 0])
        fit.add(rest)
        # Of penalties that do equally well it is the largest.
        best = max(range(len(self.penalties)), key=lambda place: (float(right[place]), self.penalties[place]))
        if count < MIN_CHOOSING:
            best = min(range(len(self.penalties)), key=lambda place: abs(math.log(self.penalties[place] / FEW_PENALTY)))
        return fit.weights(self.penalties[best]), self.penalties[best]

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        for name, features in self.features(batch.images).items():
            with torch.autocast(self.device.type, enabled=False):
                self.right[name].update((classify(features, self._weights[name]) == batch.labels).sum())
        self.evaluated.update(len(batch.labels))

    def on_test_epoch_end(self) -> None:
        count, figures = int(self.evaluated.compute()), {}
        for name, right in self.right.items():
            accuracy = float(right.compute()) / count
            error = (accuracy * (1 - accuracy) / count) ** 0.5
            figures[name] = {"accuracy": accuracy, "standard_error": error, "penalty": self._penalties[name]}
        for metric in (self.evaluated, *self.right.values()):
            metric.reset()
        save_accuracies(self, figures, f"on {count} held-out images; penalties were chosen on training images")
