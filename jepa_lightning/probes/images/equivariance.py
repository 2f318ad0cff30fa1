"""Evaluation of an image world model: can it apply a transformation, and what do its embeddings keep of one?

Shapes: B batch, H W pixels, D embedding dimension, A scalars of an action.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanMetric

from datamodules.batches import ViewBatch
from datamodules.preprocessing import denormalize
from datamodules.views import DESTRUCTIVE
from jepa_lightning.figures import show
from jepa_lightning.image_jepa import ImageJEPA
from jepa_lightning.iwm import IWM
from jepa_lightning.mean_reciprocal_rank import (
    TRANSFORMATIONS,
    ActionProbe,
    MeanReciprocalRanks,
    bank_generator,
    chance,
    nearest_figure,
)
from jepa_lightning.probes.images.base import ImageProbe
from jepa_lightning.probes.report import save_report

SHOWN = 3
"""Images in the figure."""

READERS = ("encoder", "untrained", "other_pairs")
"""Whose embeddings, and what is regressed from them: the actions, but for the last, which are those of other pairs."""


class EquivarianceProbe(ImageProbe):
    """Evaluate a world model: is it equivariant, and what is it invariant to?

    There is nothing to fit: `test` alone writes report.json, report.md and nearest_versions.png.

    * Mean reciprocal rank by the protocol of `jepa_lightning.mean_reciprocal_rank`, compared with chance, an action-blind
      predictor and shuffled actions, and for each transformation.
    * R2 of the action, regressed from the pooled embeddings of a pair of views (ridge regression), compared with that of
      the random-initialization baseline, and with that of the actions of other pairs.
    * Squared change of the pooled embeddings under a color jitter, relative to that between two images, compared with that
      of the random-initialization baseline: 0 would be invariance. (With geometric views, the change includes the other
      crop.)

    Args:
        checkpoint: Path of the checkpoint of an IWM, written by `fit`.
        num_images: Number of held-out images whose versions are ranked, with 256 versions each.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, holds no IWM, or an argument is out of its range.
    """

    needs_fit = False
    batch_type = ViewBatch

    any_size = False

    def __init__(self, checkpoint: str, num_images: int = 256) -> None:
        super().__init__(checkpoint, "target", None)
        self.save_hyperparameters()
        if num_images < 2:
            raise ValueError(f"model.num_images={num_images}: give at least 2.")
        self.num_images = num_images
        self.ranks = MeanReciprocalRanks()
        dim, action_dim = self.encoder.dim, self.jepa.predictor.action_dim
        self.action_probes = nn.ModuleDict({name: ActionProbe(dim, action_dim) for name in READERS})
        self.changes = nn.ModuleDict(
            {f"{kind}_{name}": MeanMetric() for kind in ("same", "other") for name in self.networks}
        )
        self._ranked = 0

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The encoders that are evaluated."""
        return {"encoder": self.encoder, "untrained": self.untrained}

    def take(self, jepa: ImageJEPA) -> None:
        if not isinstance(jepa, IWM):
            raise ValueError(f"{self.checkpoint} holds a {type(jepa).__name__}; EquivarianceProbe evaluates an IWM.")
        self.jepa = jepa

    def setup(self, stage: str) -> None:
        """Compare with the data module.

        Raises:
            ValueError: Images of another size, no views, or actions of another length.
        """
        super().setup(stage)
        self.jepa.check_views(self.data)

    def test_step(self, batch: ViewBatch, batch_idx: int) -> None:
        images = batch.images
        assert images is not None
        for name, network in self.networks.items():
            source, target, plain = (
                network(view).float().mean(dim=1) for view in (batch.sources, batch.targets, images)
            )  # (B, D) each
            self.action_probes[name].update(source, target, batch.actions)
            if name == "encoder":
                self.action_probes["other_pairs"].update(source, target, batch.actions.roll(1, dims=0))
            self.changes[f"same_{name}"].update((target - plain).square().sum(dim=1))
            self.changes[f"other_{name}"].update((target - plain.roll(1, dims=0)).square().sum(dim=1))
        rank, size = self.trainer.global_rank, self.trainer.world_size
        share = self.num_images // size + (rank < self.num_images % size)
        data: Any = self.trainer.datamodule
        for number, image in enumerate(denormalize(images, self.jepa.pixels)[: share - self._ranked]):
            self.ranks.update(self.jepa, image, data.views, bank_generator(batch, number, size))
            self._ranked += 1
        if batch_idx == 0 and self.trainer.is_global_zero:
            self._show(images[:SHOWN], batch.key)

    def _show(self, images: Tensor, key: tuple[int, ...]) -> None:
        """Write nearest_versions.png, and show the same figure."""
        data: Any = self.trainer.datamodule
        figure = nearest_figure(self.jepa, images, data.views, key)
        directory = Path(self.trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        figure.savefig(directory / "nearest_versions.png")
        show(self.trainer, "nearest versions", figure, self.global_step)

    def on_test_epoch_end(self) -> None:
        figures, errors, counted = self.ranks.compute()
        data: Any = self.trainer.datamodule
        names = data.views.action_names
        r2 = {name: probe.compute() for name, probe in self.action_probes.items()}
        change = {
            name: self.changes[f"same_{name}"].compute() / self.changes[f"other_{name}"].compute() for name in self.networks
        }
        for metric in (self.ranks, *self.action_probes.values(), *self.changes.values()):
            metric.reset()
        self._ranked = 0
        if not self.trainer.is_global_zero:
            return
        report: dict[str, Any] = {
            key: {
                "overall": figures[kind]["overall"],
                "standard_error": errors[kind]["overall"],
                "per_transformation": {name: figures[kind][name] for name in TRANSFORMATIONS if name in figures[kind]},
                "untold": {name: figures[kind][f"{name}_untold"] for name in DESTRUCTIVE if name in figures[kind]},
                "chance": chance(),
                "action_blind": figures[kind]["action_blind"],
                "shuffled_actions": figures[kind]["shuffled_actions"],
                "shuffled_actions_standard_error": errors[kind]["shuffled_actions"],
                "num_images": counted,
            }
            for key, kind in (("mrr", "patch"), ("mrr_pooled", "pooled"))
        }
        report["action_r2"] = {network: dict(zip(names, values.tolist(), strict=True)) for network, values in r2.items()}
        report["feature_change"] = {network: float(value) for network, value in change.items()}
        report |= {"checkpoint": self.checkpoint, "conditioning": self.jepa.predictor.conditioning}
        report |= {"views": asdict(data.views), "trained_on_views": self.jepa.trained_on}
        notes = (
            f"Of `{self.checkpoint}`, on {counted} held-out images with 256 versions each; R2 and change on all held-out "
            "pairs of views. The protocol is in jepa_lightning/mean_reciprocal_rank.py; grayscale, blur and solarize are "
            f"to be undone, the others to be applied. Jitter of strength {data.views.ranges}; trained on "
            f"{self.jepa.trained_on}. Figure: nearest_versions.png."
        )
        save_report(Path(self.trainer.default_root_dir), report, "Equivariance", notes, equivariance_table(report))


def equivariance_table(report: dict[str, Any]) -> str:
    """The figures of an `EquivarianceProbe` in Markdown."""
    patch, pooled = report["mrr"], report["mrr_pooled"]
    lines = ["| mean reciprocal rank | patch features | pooled embeddings |", "| :-- | --: | --: |"]

    def row(title: str, *values: float) -> None:
        lines.append(f"| {title} | " + " | ".join(f"{value:.4f}" for value in values) + " |")

    row("all four colors", patch["overall"], pooled["overall"])
    row("its standard error", patch["standard_error"], pooled["standard_error"])
    row("chance", patch["chance"], pooled["chance"])
    row("action-blind", patch["action_blind"], pooled["action_blind"])
    row("shuffled actions", patch["shuffled_actions"], pooled["shuffled_actions"])
    for name, value in patch["per_transformation"].items():
        row(name, value, pooled["per_transformation"][name])
    for name, value in patch["untold"].items():
        row(f"{name}, action withheld", value, pooled["untold"][name])
    r2 = report["action_r2"]
    lines += [
        "",
        "| what embeddings keep | encoder | randomly initialized encoder | actions of other pairs |",
        "| :-- | --: | --: | --: |",
    ]
    for name in r2["encoder"]:
        row(f"R2 of {name}", *(r2[reader][name] for reader in READERS))
    change = [f"{value:.4f}" for value in report["feature_change"].values()]
    lines.append(f"| change under a jitter / between images | {' | '.join(change)} | - |")
    return "\n".join(lines)
