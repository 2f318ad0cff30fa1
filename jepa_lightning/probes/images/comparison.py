"""Evaluation of the frozen encoder: is it better than no training, than pixels, than weights from elsewhere?

Shapes: B batch, H W pixels, D embedding dimension, I images.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.figure import Figure
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

from datamodules.batches import ImageBatch, batch_generator
from datamodules.pixel_format import PixelFormat
from datamodules.preprocessing import denormalize, normalize
from jepa_lightning.classifiers import classify, directions
from jepa_lightning.figures import show
from jepa_lightning.image_jepa import ImageJEPA
from jepa_lightning.networks.timm_model import TimmModel, is_timm_folder
from jepa_lightning.networks.vit import ViTEncoder
from jepa_lightning.probes.images.linear import shrunk_pixels
from jepa_lightning.probes.images.memory_bank import MemoryBank
from jepa_lightning.probes.images.retrieval import average_precisions, gallery
from jepa_lightning.probes.images.ridge import RidgeProbe
from jepa_lightning.probes.report import save_report
from jepa_lightning.weights.loading import load

NUM_NEIGHBORS, TEMPERATURE = 20, 0.07

MAX_PAIRS = 2000
"""Maximum number of held-out images that are to be found again under augmentation, and that are retrieved."""

THUMBNAIL = 64
"""Maximum height and width in pixels of what the gallery shows."""

FIGURES = {
    "linear": "linear, last four blocks",
    "knn": f"{NUM_NEIGHBORS} nearest neighbors",
    "retrieval": "mean average precision",
    "consistency": "found again under augmentation",
}
"""What is reported, and how."""


class ComparisonProbe(RidgeProbe):
    """Several encoders on the same images: the JEPA, a random initialization of it, pixels, and weights from elsewhere.

    With labels, by the linear probe in closed form on the last four blocks (see `RidgeProbe`) and by k-NN on the average of
    the last. Without labels, and with them too, by k-NN consistency: of two random crops of each held-out image, flipped and
    in other colors, is the one nearest to the first the second of the same image? Chance is one over the number of images.
    With labels also by retrieval: the mean average precision of ranking the others by their similarity.
    `test` alone does it all, and writes report.json, report.md, comparison.png, and gallery.png, which shows some images
    and those that the JEPA has nearest to them.

    Args:
        checkpoint: Path of a run directory or checkpoint of an I-JEPA or IWM.
        others: Paths of further run directories, checkpoints, weights in the layout of the released I-JEPA or of Hugging
            Face's, or folders of timm's models. A JEPA sees the same images, its positions stretched to their size,
            if its patches tile them; else, as timm's models do, the same resized to what it was trained on.
        num_classes: Number of classes; that of the data by default.
        encoder: Which encoder's embeddings are read, "target" as in the paper, or "context".
        baselines: Whether to evaluate the randomly initialized encoder and pixels, too.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be read, holds no such model, or one for other channels.
    """

    names: dict[str, str]

    def __init__(
        self,
        checkpoint: str,
        others: list[str] | None = None,
        num_classes: int | None = None,
        encoder: Literal["target", "context"] = "target",
        baselines: bool = True,
    ) -> None:
        self.names = {"jepa": "JEPA"} | ({"untrained": "random initialization", "pixels": "pixels"} if baselines else {})
        self.names |= {f"other_{place}": path for place, path in enumerate(others or [])}
        self.own = tuple(self.names)
        super().__init__(checkpoint, num_classes, encoder, baselines=baselines)
        self.save_hyperparameters()
        self.others = nn.ModuleDict()
        self._pixels: dict[str, PixelFormat] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        for place, path in enumerate(others or []):
            other = _load_other(path)
            if not isinstance(other, ImageJEPA | TimmModel) or other.channels != self.channels:
                raise ValueError(f"{path}: give an I-JEPA, an IWM or an encoder for images of {self.channels} channels.")
            network: nn.Module = other
            if isinstance(other, ImageJEPA):
                network = other.target_encoder if encoder == "target" else other.context_encoder
            self.others[f"other_{place}"] = network.requires_grad_(False).eval()
            self._pixels[f"other_{place}"], self._sizes[f"other_{place}"] = other.pixels, other.image_size
        self._frozen.append("others")

    def setup(self, stage: str) -> None:
        """Compare with the data module; labels are welcome, not needed. See `ImageProbe.setup` for the errors."""
        labeled = not getattr(self.data, "num_unlabeled", 0)
        self.needs_labels = labeled and (getattr(self.data, "num_classes", self.num_classes) or 0) > 1
        super().setup(stage)
        for name, network in self.others.items():
            if self._sizes[name] == self.image_size:
                continue
            if isinstance(network, ViTEncoder) and not any(side % network.patch_size for side in self.image_size):
                self.others[name], self._sizes[name] = network.resized(self.image_size), self.image_size
            else:
                rank_zero_info(f"{self.names[name]} sees the images of {self.image_size} resized to {self._sizes[name]}.")

    @torch.no_grad()
    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Averages of the last four blocks, or pixels, by name: normalized (B, C, H, W) -> (B, 4 D) each."""
        found = {"jepa": _pooled(self.encoder, images)}
        if self.baselines:
            found |= {"untrained": _pooled(self.untrained, images), "pixels": shrunk_pixels(images)}
        for name, network in self.others.items():
            theirs, size, seen = self._pixels[name], self._sizes[name], images
            if theirs != self.pixels or size != self.image_size:
                seen = normalize(vision.resize(denormalize(images, self.pixels), list(size)), theirs)
            found[name] = _pooled(network, seen)  # type: ignore[arg-type]
        return found

    def last(self, name: str, features: Tensor) -> Tensor:
        """Of the averages of four blocks, that of the last one; pixels as they are."""
        if name == "pixels":
            return features
        network: ViTEncoder | TimmModel = self.others[name] if name in self.others else self.encoder  # type: ignore[assignment]
        return features[:, -network.dim :]

    def on_test_start(self) -> None:
        """Fit on the training images, and keep them for the vote of the nearest, if they have labels."""
        self._banks: dict[str, MemoryBank] = {}
        self._queries: dict[str, list[Tensor]] = {name: [] for name in self.names}
        self._answers: list[Tensor] = []
        self._embeddings: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in self.names}
        self._shown: list[tuple[Tensor, Tensor]] = []
        self._paired = 0
        if self.needs_labels:
            super().on_test_start()
            for memory_bank in self._banks.values():
                memory_bank.close()

    def keep(self, features: dict[str, Tensor], labels: Tensor, count: int) -> None:
        for name, value in features.items():
            if name not in self._banks:
                self._banks[name] = MemoryBank(count, self.trainer.global_rank, self.trainer.world_size)
            self._banks[name].add(self.last(name, value).float(), labels)

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self.evaluated.update(len(batch.labels))
        wanted = min(len(batch.labels), -(-MAX_PAIRS // self.trainer.world_size) - self._paired)
        if not self.needs_labels and not wanted:
            return
        features = self.features(batch.images if self.needs_labels else batch.images[:wanted])
        if self.needs_labels:
            self._answers.append(batch.labels)
            for name, value in features.items():
                with torch.autocast(self.device.type, enabled=False):
                    self.right[name].update((classify(value, self._weights[name]) == batch.labels).sum())
                self._queries[name].append(self.last(name, value).float().cpu())
        if wanted:
            plain = denormalize(batch.images[:wanted], self.pixels)
            self._shown.append((thumbnails(plain).cpu(), batch.labels[:wanted].cpu()))
            views = [self.features(normalize(v, self.pixels)) for v in augmented_twice(plain, batch_generator(batch))]
            for name in self.names:
                found = (self.last(name, of[name][:wanted]).float().cpu() for of in (features, *views))
                self._embeddings[name].append(tuple(found))
            self._paired += wanted

    def on_test_epoch_end(self) -> None:
        count = int(self.evaluated.compute())
        self.evaluated.reset()
        figures: dict[str, dict[str, float]] = {name: {} for name in self.names}
        images, labels = (_of_all(torch.cat(of)) for of in zip(*self._shown, strict=True))
        retrieved: Figure | None = None
        for name in self.names:
            plain, first, second = (_of_all(torch.cat(of)) for of in zip(*self._embeddings.pop(name), strict=True))
            retrieved = retrieved or gallery(images, plain, labels)  # of the JEPA, which comes first
            if self.needs_labels:
                figures[name] |= _with_error("linear", float(self.right[name].compute()) / count, count)
                queries, answers = torch.cat(self._queries.pop(name)).to(self.device), torch.cat(self._answers)
                votes = self._banks.pop(name).vote(queries, NUM_NEIGHBORS, TEMPERATURE)
                right = self.trainer.strategy.reduce((votes == answers).sum(), reduce_op="sum")
                figures[name] |= _with_error("knn", float(right) / count, count)
                figures[name] |= _mean_with_error("retrieval", average_precisions(plain, labels))
            figures[name] |= _with_error("consistency", float(found_again(first, second).float().mean()), len(labels))
            self.right[name].reset()
        if self.trainer.is_global_zero:
            assert retrieved is not None
            self._report(figures, count, len(labels), retrieved)

    def _report(self, figures: dict[str, dict[str, float]], count: int, pairs: int, retrieved: Figure) -> None:
        report = {"comparison": figures, "names": self.names, "checkpoint": self.checkpoint}
        report |= {"num_images": count, "num_pairs": pairs, "chance_consistency": 1 / pairs}
        report |= {"image_size": list(self.image_size)}
        shown = [kind for kind in FIGURES if kind in figures["jepa"]]
        lines = ["| encoder | " + " | ".join(FIGURES[kind] for kind in shown) + " |", "| :-- |" + " --: |" * len(shown)]
        for name, title in self.names.items():
            cells = [f"{figures[name][kind]:.3f} ({figures[name][f'{kind}_standard_error']:.3f})" for kind in shown]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
        notes = (
            f"`{self.checkpoint}`: accuracies (standard error) on {count} held-out images; found again: of {pairs} held-out "
            f"images, the one whose second crop is nearest to its first, chance {1 / pairs:.4f}. "
            + (f"Mean average precision: of each of these {pairs} among the others. " if "retrieval" in shown else "")
            + f"Images of {self.image_size[0]} x {self.image_size[1]} pixels. "
            + "Figures: comparison.png, and gallery.png with the images nearest to some of them."
        )
        directory = Path(self.trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        for kind, figure in (("comparison", bars(figures, self.names, shown)), ("gallery", retrieved)):
            figure.savefig(directory / f"{kind}.png")
            show(self.trainer, kind, figure, self.global_step)
        save_report(directory, report, "Comparison", notes, "\n".join(lines))


def _load_other(path: str) -> nn.Module:
    """What `load` reads, or one of timm's models."""
    try:
        return load(path)
    except (FileNotFoundError, ValueError):  # not of an I-JEPA's architecture, or not in safetensors
        if not is_timm_folder(path):
            raise
        return TimmModel(path)


def _pooled(encoder: ViTEncoder | TimmModel, images: Tensor) -> Tensor:
    """Averages over the patches of the last four blocks, one after the other: (B, C, H, W) -> (B, 4 D)."""
    return torch.cat([block.float().mean(dim=1) for block in encoder.last_blocks(images, 4)], dim=1)


def thumbnails(images: Tensor) -> Tensor:
    """Small images in [0, 1] of uint8 ones: (B, C, H, W) -> (B, C, h, w)."""
    height, width = (min(THUMBNAIL, side) for side in images.shape[-2:])
    return F.adaptive_avg_pool2d(images.float(), (height, width)) / 255


def augmented_twice(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two random crops of each image, flipped at random and, if it has colors, in other ones: uint8 (B, C, H, W) twice."""
    steps: list[Any] = [v2.RandomResizedCrop(images.shape[-2:], scale=(0.4, 1.0)), v2.RandomHorizontalFlip()]
    if images.shape[1] == 3:
        steps.append(v2.ColorJitter(0.4, 0.4, 0.2, 0.1))
    change = v2.Compose(steps)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.set_state(generator.get_state())
        views = [torch.stack([change(image) for image in images]) for _ in range(2)]
    return views[0], views[1]


def found_again(first: Tensor, second: Tensor) -> Tensor:
    """Whether, of all second views, that of the same image is the most similar to the first one: (I, D) twice -> (I,)."""
    ours, theirs = (directions(of, of.mean(dim=0)) for of in (first, second))
    return torch.cat([part @ theirs.T for part in ours.split(500)]).argmax(dim=1) == torch.arange(len(ours))


def _of_all(mine: Tensor) -> Tensor:
    """Rows of all processes, in the order of their ranks; another number in each."""
    if not distributed.is_initialized():
        return mine
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, mine)
    return torch.cat(gathered)


def _mean_with_error(kind: str, values: Tensor) -> dict[str, float]:
    error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return {kind: float(values.mean()), f"{kind}_standard_error": error}


def _with_error(kind: str, fraction: float, count: int) -> dict[str, float]:
    return {kind: fraction, f"{kind}_standard_error": (fraction * (1 - fraction) / count) ** 0.5}


def bars(figures: dict[str, dict[str, float]], names: dict[str, str], kinds: list[str]) -> Figure:
    """A group of bars for each kind of figure, one bar for each encoder."""
    figure = Figure(figsize=(2 + 2.2 * len(kinds), 3.2), dpi=100, layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(names)
    for place, (name, title) in enumerate(names.items()):
        heights = [figures[name][kind] for kind in kinds]
        errors = [figures[name][f"{kind}_standard_error"] for kind in kinds]
        where = [group + place * width for group in range(len(kinds))]
        axis.bar(where, heights, width, yerr=errors, label=Path(title).name if name.startswith("other") else title)
    axis.set(
        xticks=[group + 0.4 - width / 2 for group in range(len(kinds))], ylabel="fraction right, precision", ylim=(0, None)
    )
    axis.set_xticklabels([FIGURES[kind].replace(" under", "\nunder").replace(", ", ",\n") for kind in kinds])
    axis.legend(fontsize="small")
    axis.spines[["top", "right"]].set_visible(False)
    return figure
