"""Phase two, world models: can it apply a transformation, and what do its features keep of one?

Shapes: B batch, H W pixels, D width, A scalars of an action.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanMetric

from datamodules.batches import ViewBatch
from datamodules.randomness import BANK_STREAM, seeded_generator
from jepa_lightning.equivariance import (
    TRANSFORMATIONS,
    ActionProbe,
    MeanReciprocalRanks,
    chance,
    nearest_figure,
    to_uint8,
)
from jepa_lightning.iwm import IWM
from jepa_lightning.picture_jepa import PictureJEPA
from jepa_lightning.pictures import show_in_tensorboard
from jepa_lightning.probes.frozen import PictureProbe
from jepa_lightning.probes.report import save_report

SHOWN = 3
"""Pictures in the figure."""


class EquivarianceProbe(PictureProbe):
    """Judge a world model: is it equivariant, and what is it invariant to?

    There is nothing to fit: `test` alone writes report.json, report.md and nearest_versions.png.

    * Mean reciprocal rank by the protocol of `jepa_lightning.equivariance`, beside chance, an action-blind predictor and
      shuffled actions, and for each transformation.
    * R2 of the action, read from the pooled features of a pair of views (ridge regression; 0 would be invariance), beside
      that of the untrained encoder.
    * Squared change of the pooled features under a colour jitter, relative to that between two pictures, beside that of the
      untrained encoder: 0 would be invariance.

    Args:
        checkpoint: Of an IWM, written by `fit`.
        num_pictures: Held-out pictures whose versions are ranked, with 256 versions each.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, holds no IWM, or an argument is out of its range.
    """

    needs_fit = False

    def __init__(self, checkpoint: str, num_pictures: int = 256) -> None:
        super().__init__(checkpoint, "target", None)
        self.save_hyperparameters()
        if num_pictures < 2:
            raise ValueError(f"model.num_pictures={num_pictures}: give at least 2.")
        self.num_pictures = num_pictures
        self.ranks = MeanReciprocalRanks()
        dim, action_dim = self.encoder.dim, self.jepa.predictor.action_dim
        self.action_probes = nn.ModuleDict({name: ActionProbe(dim, action_dim) for name in ("encoder", "untrained")})
        self.changes = nn.ModuleDict(
            {f"{kind}_{name}": MeanMetric() for kind in ("same", "other") for name in self.networks}
        )
        self._ranked = 0

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The encoders that are judged."""
        return {"encoder": self.encoder, "untrained": self.untrained}

    def take(self, jepa: PictureJEPA) -> None:
        if not isinstance(jepa, IWM):
            raise ValueError(f"{self.checkpoint} holds a {type(jepa).__name__}; EquivarianceProbe judges an IWM.")
        self.jepa = jepa

    def setup(self, stage: str) -> None:
        """Compare with the data module.

        Raises:
            ValueError: Pictures of another size, no views, or actions of another length.
        """
        super().setup(stage)
        self.jepa.check_views(getattr(self.trainer, "datamodule", None))

    def test_step(self, batch: ViewBatch, batch_idx: int) -> None:
        images = batch.images
        assert images is not None
        for name, network in self.networks.items():
            source, target, plain = (
                network(view).float().mean(dim=1) for view in (batch.sources, batch.targets, images)
            )  # (B, D) each
            self.action_probes[name].update(source, target, batch.actions)
            self.changes[f"same_{name}"].update((target - plain).square().sum(dim=1))
            self.changes[f"other_{name}"].update((target - plain.roll(1, dims=0)).square().sum(dim=1))
        share = -(-self.num_pictures // self.trainer.world_size)  # of each process
        data: Any = self.trainer.datamodule
        for number, picture in enumerate(to_uint8(images)[: share - self._ranked]):
            generator = seeded_generator(*batch.key, BANK_STREAM, number)
            self.ranks.update(self.jepa, picture, data.views.ranges, generator)
            self._ranked += 1
        if batch_idx == 0 and self.trainer.is_global_zero:
            self._show(images[:SHOWN], batch.key)

    def _show(self, images: Tensor, key: tuple[int, ...]) -> None:
        """Write nearest_versions.png, and the same figure to TensorBoard."""
        data: Any = self.trainer.datamodule
        figure = nearest_figure(self.jepa, images, data.views.ranges, key)
        directory = Path(self.trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        figure.savefig(directory / "nearest_versions.png")
        show_in_tensorboard(self.logger, "nearest versions", figure, self.global_step)

    def on_test_epoch_end(self) -> None:
        figures, errors, counted = self.ranks.compute()
        data: Any = self.trainer.datamodule
        names = data.views.action_names
        r2 = {name: probe.compute() for name, probe in self.action_probes.items()}
        change = {name: self.changes[f"same_{name}"].compute() / self.changes[f"other_{name}"].compute() for name in r2}
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
        notes = (
            f"Of `{self.checkpoint}`, on {counted} held-out pictures with 256 versions each; R2 and change on all held-out "
            "pairs of views. The protocol stands in jepa_lightning/equivariance.py; grayscale, blur and solarize are to be "
            "undone, the others to be applied. Pictures: nearest_versions.png."
        )
        save_report(Path(self.trainer.default_root_dir), report, "Equivariance", notes, equivariance_table(report))


def equivariance_table(report: dict[str, Any]) -> str:
    """The figures of an `EquivarianceProbe` in Markdown."""
    patch, pooled = report["mrr"], report["mrr_pooled"]
    lines = ["| mean reciprocal rank | patch features | pooled features |", "| :-- | --: | --: |"]

    def row(title: str, *values: float) -> None:
        lines.append(f"| {title} | " + " | ".join(f"{value:.4f}" for value in values) + " |")

    row("all four colours", patch["overall"], pooled["overall"])
    row("its standard error", patch["standard_error"], pooled["standard_error"])
    row("chance", patch["chance"], pooled["chance"])
    row("action-blind", patch["action_blind"], pooled["action_blind"])
    row("shuffled actions", patch["shuffled_actions"], pooled["shuffled_actions"])
    for name, value in patch["per_transformation"].items():
        row(name, value, pooled["per_transformation"][name])
    lines += ["", "| what features keep | encoder | untrained encoder |", "| :-- | --: | --: |"]
    for name, value in report["action_r2"]["encoder"].items():
        row(f"R2 of {name}", value, report["action_r2"]["untrained"][name])
    row("change under a jitter / between pictures", *report["feature_change"].values())
    return "\n".join(lines)
