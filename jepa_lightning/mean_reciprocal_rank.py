"""Can a world model apply a transformation? Mean reciprocal rank, by a protocol of our own.

For each image, 256 candidate versions of it are made and encoded by the target encoder. From the clean image, all of it
visible, the predictor predicts the features of each version in turn, given the version's action. The prediction's
similarity to the features of all versions ranks them, and the reciprocal of the right one's rank is averaged over versions
and images. 1 means that every change is applied exactly. A predictor that ignores the action gives the same answer to all
256 queries, so that each version is first for exactly one of them: 1/256 (1 + 1/2 + ... + 1/256) = 0.0239 is chance.

* The versions of "jitter" have other brightness, contrast, saturation and hue, drawn as the training's target views are;
  those of "brightness" and the other three differ in that alone. Degraded versions are never targets in training; so for
  "grayscale", "blur" and "solarize" it is the source that is degraded, and the action says that this is to be undone, on
  top of the jitter. "grayscale_untold" and so on is the baseline: the same, but the action does not say so. What grayscale
  took away can at best be guessed. Geometry is not ranked.
* Features are layer-normalized as in training. Similarity is the cosine, averaged over patches ("patch") or of the average
  over patches ("pooled").
* Equal similarities share the ranks that they cover: a right version among e equal ones, behind b better ones, gets the mean
  of 1/(b+1) ... 1/(b+e).
* Two baselines: "action_blind" predicts with the zero action, "shuffled_actions" with the action of a random version.

The figure is not comparable with the paper's, whose protocol is not public (its action-blind models have 0.00).

Shapes: V versions, Q queries, N patches, D embedding dimension, A scalars of an action, H W pixels.
"""

from typing import NamedTuple, Protocol

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from datamodules.batches import ViewBatch
from datamodules.pixel_format import PixelFormat
from datamodules.preprocessing import denormalize, normalize
from datamodules.rng import BANK_STREAM, seeded_generator
from datamodules.views import COLORS, DESTRUCTIVE, Views, action_to, draw_jitter, on_grid, recolor
from jepa_lightning.figures import rows_figure, to_colors
from jepa_lightning.metrics import RidgeR2, reciprocal_ranks
from jepa_lightning.wide import WideMetric

BANK_SIZE = 256

JITTERED = ("brightness", "contrast", "saturation", "hue")

TRANSFORMATIONS = (*JITTERED, *DESTRUCTIVE)

QUESTIONS = ("overall", "action_blind", "shuffled_actions", *TRANSFORMATIONS, *(f"{name}_untold" for name in DESTRUCTIVE))

SIMILARITIES = ("patch", "pooled")

CHUNK = 64
"""Versions that go through a network at once."""


class AppliesActions(Protocol):
    """What the protocol needs of a world model."""

    context_encoder: nn.Module

    @property
    def pixels(self) -> PixelFormat:
        """How images are normalized for it."""

    def encode_targets(self, images: Tensor) -> Tensor:
        """The space of predictions: normalized (B, 3, H, W) -> (B, N, D)."""

    def apply_actions(self, features: Tensor, actions: Tensor) -> Tensor:
        """Features of all patches after actions: (B, N, D) of the context encoder and (B, 7) -> (B, N, D)."""


def draw_bank(views: Views, which: str, generator: torch.Generator) -> Tensor:
    """Colors of the candidate versions of an image: (V, 7).

    Args:
        views: Settings of the views, which say how far the colors reach.
        which: "jitter" for brightness, contrast, saturation and hue, or one of the four.
        generator: Random generator on the CPU.
    """
    sampler = v2.ColorJitter(*views.ranges)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.set_state(generator.get_state())
        drawn = torch.stack([on_grid([*draw_jitter(sampler), 0.0, 0.0, 0.0]) for _ in range(BANK_SIZE)])
        generator.set_state(torch.default_generator.get_state())
    if which != "jitter":
        drawn = drawn * torch.tensor([float(name == which) for name in COLORS])
    return drawn


def make_versions(image: Tensor, colors: Tensor, pixels: PixelFormat) -> Tensor:
    """Versions of an image: uint8 (3, H, W) and (V, 7) -> normalized (V, 3, H, W)."""
    return normalize(torch.stack([recolor(image, scalars) for scalars in colors]), pixels)


class Answers:
    """Predictions of a world model about the versions of one image.

    Args:
        model: World model to evaluate.
        image: Image, uint8 (3, H, W), on the model's device.
        colors: Colors of the versions, (V, 7).
        views: Settings of the views that the model was trained on: how the source is made, and the blur.
    """

    def __init__(self, model: AppliesActions, image: Tensor, colors: Tensor, views: Views) -> None:
        self.model, self.image, self.colors, self.views = model, image, colors, views
        self.versions = make_versions(image, colors, model.pixels)
        features = torch.cat([model.encode_targets(part) for part in self.versions.split(CHUNK)])  # (V, N, D)
        self.directions = self._directions(features)

    def predictions(self, actions: Tensor, degraded: str | None = None) -> Tensor:
        """Predicted features after actions on the clean image, or on the degraded one.

        Args:
            actions: Actions, (Q, 7).
            degraded: Degradation of the source, one of `DESTRUCTIVE`; none by default.

        Returns:
            (Q, N, D).
        """
        source = self.model.context_encoder(
            make_versions(self.image, self.start(degraded)[None], self.model.pixels)
        )  # (1, N, D)
        parts = [
            self.model.apply_actions(source.expand(len(part), -1, -1), part)
            for part in actions.to(self.image.device).split(CHUNK)
        ]
        return torch.cat(parts)

    def start(self, degraded: str | None) -> Tensor:
        """Colors of the source, (7,): a blur is as strong as it gets in training."""
        strength = self.views.blur_sigma[1] / COLORS["blur"] if degraded == "blur" else 1.0
        return torch.tensor([strength * (name == degraded) for name in COLORS])

    def actions(self, degraded: str | None = None) -> Tensor:
        """The actions that lead to all versions, (V, 7)."""
        return action_to(self.colors, self.views) - self.start(degraded)

    def similarities(self, predictions: Tensor) -> list[Tensor]:
        """Similarities of predictions (Q, N, D) to all versions, in the order of `SIMILARITIES`: (Q, V) each."""
        return [mine @ theirs.T for mine, theirs in zip(self._directions(predictions), self.directions, strict=True)]

    @staticmethod
    def _directions(features: Tensor) -> list[Tensor]:
        """Vectors whose products are the similarities, in the order of `SIMILARITIES`: (V, N, D) -> (V, any) each."""
        # In double precision: the cosines of similar versions differ by less than float32 resolves near 1.
        features = features.double()
        patches = F.normalize(features, dim=-1).flatten(1) / features.shape[1] ** 0.5
        return [patches, F.normalize(features.mean(dim=1), dim=-1)]


class Ranks(NamedTuple):
    """Mean reciprocal ranks: kind of similarity -> question -> figure, of the questions that were evaluated."""

    mean: dict[str, dict[str, float]]
    standard_error: dict[str, dict[str, float]]
    """Over images."""

    num_images: int


class MeanReciprocalRanks(WideMetric):
    """The means of the protocol above, over versions and images."""

    full_state_update = False
    total: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "squares", "count"):
            state = torch.zeros(len(SIMILARITIES), len(QUESTIONS), dtype=torch.float64)
            self.add_state(name, state, dist_reduce_fx="sum")

    @torch.no_grad()
    def update(
        self, model: AppliesActions, image: Tensor, views: Views, generator: torch.Generator, each: bool = True
    ) -> None:
        """Evaluate one image.

        Args:
            model: World model to evaluate.
            image: Image, uint8 (3, H, W), on the model's device.
            views: Settings of the views, which say how the versions differ.
            generator: Random generator on the CPU that draws the versions.
            each: Evaluate each transformation on its own too, not the jitter and its baselines alone.
        """
        answers = Answers(model, image, draw_bank(views, "jitter", generator), views)
        conditioned = answers.similarities(answers.predictions(answers.actions()))
        self._count("overall", conditioned)
        blind = answers.similarities(answers.predictions(torch.zeros(1, len(COLORS))))
        self._count("action_blind", [row.expand(BANK_SIZE, -1) for row in blind])
        order = torch.randperm(BANK_SIZE, generator=generator).to(image.device)
        self._count("shuffled_actions", [rows[order] for rows in conditioned])
        if not each:
            return
        for name in DESTRUCTIVE:
            if getattr(views, f"{name}_probability") > 0:
                for question, actions in ((name, answers.actions(name)), (f"{name}_untold", answers.actions())):
                    self._count(question, answers.similarities(answers.predictions(actions, name)))
        for name, maximum in zip(JITTERED, views.ranges, strict=True):
            if maximum > 0:  # or else all versions are the same
                answers = Answers(model, image, draw_bank(views, name, generator), views)
                self._count(name, answers.similarities(answers.predictions(answers.actions())))

    def _count(self, question: str, similarities: list[Tensor]) -> None:
        right = torch.arange(BANK_SIZE, device=self.total.device)
        column = QUESTIONS.index(question)
        for row, similarity in enumerate(similarities):
            figure = reciprocal_ranks(similarity, right).mean()
            self.total[row, column] += figure
            self.squares[row, column] += figure.square()
            self.count[row, column] += 1

    def compute(self) -> Ranks:
        """The figures so far."""
        mean = self.total / self.count
        error = ((self.squares / self.count - mean.square()).clamp(min=0) / (self.count - 1)).sqrt()
        asked = [(column, question) for column, question in enumerate(QUESTIONS) if self.count[0, column] > 0]

        def named(figures: Tensor) -> dict[str, dict[str, float]]:
            return {
                kind: {question: figures[row, column].item() for column, question in asked}
                for row, kind in enumerate(SIMILARITIES)
            }

        return Ranks(named(mean), named(error), int(self.count[0, 0]))


class ActionProbe(RidgeR2):
    """What embeddings keep of a transformation: ridge regression of the action on the pooled embeddings of two views.

    Every other pair is for training, the rest are evaluated. Invariant embeddings have 0, or less where there are few
    pairs: compare with the R2 of actions of other pairs.

    Args:
        dim: Embedding dimension D.
        action_dim: Number of scalars of an action, A.
    """

    def __init__(self, dim: int, action_dim: int) -> None:
        super().__init__(2 * dim, action_dim, ridge=1e-4)

    def update(self, sources: Tensor, targets: Tensor, actions: Tensor) -> None:  # type: ignore[override]
        """Add pooled embeddings (B, D) of sources and targets, and the actions (B, A) between them."""
        both = torch.cat([sources, targets], dim=1)
        for half in (0, 1):
            RidgeR2.update(self, both[half::2], actions[half::2], half == 0)


@torch.no_grad()
def nearest_figure(model: AppliesActions, images: Tensor, views: Views, key: tuple[int, ...], count: int = 8) -> Figure:
    """Images, versions that the predictor is to predict, and the nearest of 256 versions to each prediction.

    Args:
        model: World model to evaluate.
        images: Normalized images, (B, 3, H, W).
        views: Settings of the views, which say how the versions differ.
        key: Key of the random numbers.
        count: Number of versions of each image.
    """
    rows: dict[str, Tensor] = {}
    for number, (image, plain) in enumerate(zip(images, denormalize(images, model.pixels), strict=True)):
        answers = Answers(model, plain, draw_bank(views, "jitter", seeded_generator(*key, BANK_STREAM, number)), views)
        similarity = answers.similarities(answers.predictions(answers.actions()[:count]))[0]
        found = answers.versions[similarity.argmax(dim=1)]
        for title, versions in (("asked", answers.versions[:count]), ("nearest", found)):
            rows[f"{title} {number + 1}"] = to_colors(torch.cat([image[None], versions]), model.pixels)
    return rows_figure(rows)


def bank_generator(batch: ViewBatch, number: int, num_processes: int) -> torch.Generator:
    """Random numbers for the versions of a held-out image, whatever the size of its batch and the number of processes.

    Args:
        batch: Batch whose key ends with the index of its first image.
        number: Index of the image in the batch.
        num_processes: Number of processes, which take turns at the images.
    """
    return seeded_generator(batch.key[0], BANK_STREAM, batch.key[-1] + number * num_processes)


def chance(count: int = BANK_SIZE) -> float:
    """Mean reciprocal rank of a predictor that ignores the action: H_count / count."""
    return sum(1 / rank for rank in range(1, count + 1)) / count
