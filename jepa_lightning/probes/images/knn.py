"""Evaluation of the frozen encoder: k-NN classification, which needs no training of its own."""

from typing import Literal

import torch
from torch import Tensor, nn
from torchmetrics import SumMetric

from datamodules.batches import ImageBatch
from jepa_lightning.probes.images.base import ImageProbe
from jepa_lightning.probes.images.linear import shrunk_pixels
from jepa_lightning.probes.images.memory_bank import MemoryBank
from jepa_lightning.probes.images.training_features import encoded, training_share
from jepa_lightning.probes.report import save_accuracies


class KNNProbe(ImageProbe):
    """k-NN on frozen, average-pooled embeddings: which training images look alike, and what are they?

    There is nothing to fit: `test` alone encodes the training images without crops, lets the k most similar vote on each
    held-out one, each vote weighted by exp(cosine similarity / temperature) (Wu et al. 2018), and writes report.json and
    report.md. Baselines: the same on embeddings of the randomly initialized encoder and on pixels.

    Processes share the training images out among them: each encodes and keeps its share, in the host's memory, 4 bytes per
    number. Of ImageNet that is 6.6 GB over all processes for a ViT-H, and 22 GB more with the baselines.

    Args:
        checkpoint: Path of the checkpoint of an I-JEPA or IWM, written by `fit` or imported.
        num_classes: Number of classes of the data.
        encoder: Which encoder's embeddings are read, "target" or "context".
        num_neighbors: Number of neighbors k.
        temperature: Temperature of the weights of the votes.
        baselines: Whether to evaluate the randomly initialized encoder and pixels, too.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, holds no such model, or an argument is out of its range.
    """

    names = {  # noqa: RUF012
        "features": "average of the last block",
        "untrained": "randomly initialized encoder",
        "pixels": "pixels",
    }
    own = ("features",)

    def __init__(
        self,
        checkpoint: str,
        num_classes: int | None = None,
        encoder: Literal["target", "context"] = "target",
        num_neighbors: int = 20,
        temperature: float = 0.07,
        baselines: bool = True,
    ) -> None:
        super().__init__(checkpoint, encoder, num_classes, baselines)
        self.save_hyperparameters()
        if num_neighbors < 1 or not temperature > 0:
            raise ValueError(
                f"model.num_neighbors={num_neighbors}, model.temperature={temperature}: give at least one neighbor and "
                "a positive temperature."
            )
        self.num_neighbors, self.temperature = num_neighbors, temperature
        self.right = nn.ModuleDict({name: SumMetric() for name in self.names})
        self.evaluated = SumMetric()

    @torch.no_grad()
    def features(self, images: Tensor) -> dict[str, Tensor]:
        """By kind: normalized images (B, 3, H, W) -> (B, width)."""
        found = {"features": self.encoder(images).float().mean(dim=1)}
        if self.baselines:
            found |= {"untrained": self.untrained(images).float().mean(dim=1), "pixels": shrunk_pixels(images)}
        return found

    needs_fit = False

    def on_test_start(self) -> None:
        """Encode this process's share of the training images."""
        rank, num_ranks = self.trainer.global_rank, self.trainer.world_size
        loader = training_share(self)
        self._banks = {name: MemoryBank(len(loader.dataset), rank, num_ranks) for name in self.names}  # type: ignore[arg-type]
        for features, labels in encoded(self, loader):
            for name, memory_bank in self._banks.items():
                memory_bank.add(features[name], labels)
        self._queries: dict[str, list[Tensor]] = {name: [] for name in self.names}
        self._answers: list[Tensor] = []

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        # The search needs all processes, which may have batches of other sizes and more or fewer of them: it comes later.
        for name, features in self.features(batch.images).items():
            self._queries[name].append(features.float().cpu())
        self._answers.append(batch.labels)

    def on_test_epoch_end(self) -> None:
        answers, figures = torch.cat(self._answers), {}
        self.evaluated.update(len(answers))
        count = int(self.evaluated.compute())
        for name, memory_bank in self._banks.items():
            members = memory_bank.close()
            queries = torch.cat(self._queries.pop(name)).to(self.device)
            with torch.autocast(self.device.type, enabled=False):
                votes = memory_bank.vote(queries, self.num_neighbors, self.temperature)
            self.right[name].update((votes == answers).sum())
            accuracy = float(self.right[name].compute()) / count
            error = (accuracy * (1 - accuracy) / count) ** 0.5
            figures[name] = {"accuracy": accuracy, "standard_error": error, "num_neighbors": self.num_neighbors}
        for metric in (self.evaluated, *self.right.values()):
            metric.reset()
        self._banks, self._answers = {}, []
        save_accuracies(self, figures, f"on {count} held-out images, against {members} training images")
