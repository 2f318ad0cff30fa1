"""Phase two, pictures: the vote of the nearest training pictures, which needs no training of its own."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric

from datamodules.batches import ImageBatch
from jepa_lightning.metrics import directions, vote
from jepa_lightning.probes.classification import shrunk_pixels
from jepa_lightning.probes.frozen import PictureProbe
from jepa_lightning.probes.report import save_accuracies


class NeighbourProbe(PictureProbe):
    """k-NN on frozen, average-pooled features: which training pictures look alike, and what are they?

    There is nothing to fit: `test` alone encodes the training pictures without crops, lets the k most similar vote on each
    held-out one, each vote weighted by exp(cosine similarity / temperature) (Wu et al. 2018), and writes report.json and
    report.md. The same on features of the untrained network and on pixels stands beside it.

    Args:
        checkpoint: Of an I-JEPA or IWM, written by `fit` or imported.
        num_classes: Classes of the data.
        encoder: Whose features are read: the target encoder's or the context encoder's.
        num_neighbours: k.
        temperature: Of the weights.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, holds no such model, or an argument is out of its range.
    """

    names = {"features": "average of the last block", "untrained": "untrained encoder", "pixels": "pixels"}  # noqa: RUF012

    def __init__(
        self,
        checkpoint: str,
        num_classes: int = 10,
        encoder: Literal["target", "context"] = "target",
        num_neighbours: int = 20,
        temperature: float = 0.07,
    ) -> None:
        super().__init__(checkpoint, encoder, num_classes)
        self.save_hyperparameters()
        if num_neighbours < 1 or not temperature > 0:
            raise ValueError(
                f"model.num_neighbours={num_neighbours}, model.temperature={temperature}: give at least one neighbour and "
                "a positive temperature."
            )
        self.num_neighbours, self.temperature = num_neighbours, temperature
        self.accuracies = nn.ModuleDict({name: MeanMetric() for name in self.names})
        self.judged = SumMetric()
        self._banks: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def features(self, images: Tensor) -> dict[str, Tensor]:
        """By kind: normalised images (B, 3, H, W) -> (B, width)."""
        return {
            "features": self.encoder(images).float().mean(dim=1),
            "untrained": self.untrained(images).float().mean(dim=1),
            "pixels": shrunk_pixels(images),
        }

    needs_fit = False

    def on_test_start(self) -> None:
        """Encode the training pictures: every process all of them."""
        data: Any = self.trainer.datamodule
        found: dict[str, list[Tensor]] = {name: [] for name in (*self.names, "labels")}
        for batch in data.plain_train_dataloader():
            batch = data.on_after_batch_transfer(data.transfer_batch_to_device(batch, self.device, 0), 0)
            with self.trainer.precision_plugin.test_step_context():
                features = self.features(batch.images)
            for name, value in (features | {"labels": batch.labels}).items():
                found[name].append(value)
        self._labels = torch.cat(found.pop("labels"))
        for name in self.names:
            members = torch.cat(found.pop(name))
            mean = members.mean(dim=0)
            self._banks[name] = (directions(members, mean), mean)

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        for name, features in self.features(batch.images).items():
            bank, mean = self._banks[name]
            with torch.autocast(self.device.type, enabled=False):
                votes = vote(bank, self._labels, directions(features, mean), self.num_neighbours, self.temperature)
            self.accuracies[name].update((votes == batch.labels).float())
        self.judged.update(len(batch.labels))

    def on_test_epoch_end(self) -> None:
        figures, count = {}, int(self.judged.compute())
        self.judged.reset()
        for name, metric in self.accuracies.items():
            accuracy = float(metric.compute())
            error = (accuracy * (1 - accuracy) / count) ** 0.5
            figures[name] = {"accuracy": accuracy, "standard_error": error, "num_neighbours": self.num_neighbours}
            metric.reset()
        save_accuracies(self, figures, f"on {count} held-out pictures, against {len(self._labels)} training pictures")
