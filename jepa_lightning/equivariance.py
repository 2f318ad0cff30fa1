"""Can a world model apply a transformation? Mean reciprocal rank, by a protocol of our own.

For each picture, a bank of 256 versions of it is made and encoded by the target encoder. From the clean picture, all of it
visible, the predictor is asked for the features of each version in turn, given the version's action. The prediction's
similarity to the features of all versions ranks them, and the reciprocal of the right one's rank is averaged over versions
and pictures. 1 means that every change is applied exactly. A predictor that does not listen gives the same answer to all
256 questions, so that each version is first for exactly one of them: 1/256 (1 + 1/2 + ... + 1/256) = 0.0239 is chance.

* The versions of "jitter" have other brightness, contrast, saturation and hue, drawn as the training's target views are;
  those of "brightness" and the other three differ in that alone. Spoilt versions are never targets in training; so for
  "grayscale", "blur" and "solarize" it is the source that is spoilt so, and the action says that this is to be undone, on
  top of the jitter. What grayscale took away can at best be guessed.
* Features are layer-normalised as in training. Similarity is the cosine, averaged over patches ("patch") or of the average
  over patches ("pooled").
* Equal similarities share the ranks that they cover: a right version among e equal ones, behind b better ones, gets the mean
  of 1/(b+1) ... 1/(b+e).
* Two controls: "action_blind" asks with the zero action, "shuffled_actions" with the action of a random version.

The figure is not comparable with the paper's, whose protocol is not public (its action-blind models have 0.00).

Shapes: V versions, N patches, D width, A scalars of an action, H W pixels.
"""

from typing import NamedTuple, Protocol

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchvision.transforms import v2

from datamodules.image_folder import normalise
from datamodules.randomness import BANK_STREAM, seeded_generator
from datamodules.transformations import COLOURS, DESTRUCTIVE, draw_jitter, on_grid, recolour
from jepa_lightning.metrics import RidgeProbe, reciprocal_ranks
from jepa_lightning.pictures import rows_figure, to_colours

BANK_SIZE = 256

JITTERED = ("brightness", "contrast", "saturation", "hue")

TRANSFORMATIONS = (*JITTERED, *DESTRUCTIVE)

QUESTIONS = ("overall", "action_blind", "shuffled_actions", *TRANSFORMATIONS)

SIMILARITIES = ("patch", "pooled")

CHUNK = 64
"""Versions that go through a network at once."""


class AppliesActions(Protocol):
    """What is asked of a world model."""

    context_encoder: nn.Module

    def encode_targets(self, images: Tensor) -> Tensor:
        """The space of predictions: normalised (B, 3, H, W) -> (B, N, D)."""

    def apply_actions(self, features: Tensor, actions: Tensor) -> Tensor:
        """Features of all patches after actions: (B, N, D) of the context encoder and (B, 7) -> (B, N, D)."""


def draw_bank(ranges: tuple[float, float, float, float], which: str, generator: torch.Generator) -> Tensor:
    """Colours of a bank's versions: (V, 7).

    Args:
        ranges: Greatest change of brightness, contrast, saturation and hue.
        which: "jitter" for all four, or one of them.
        generator: On the CPU.
    """
    sampler = v2.ColorJitter(*ranges)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.set_state(generator.get_state())
        drawn = torch.stack([on_grid([*draw_jitter(sampler), 0.0, 0.0, 0.0]) for _ in range(BANK_SIZE)])
        generator.set_state(torch.default_generator.get_state())
    if which != "jitter":
        drawn = drawn * torch.tensor([float(name == which) for name in COLOURS])
    return drawn


def make_versions(picture: Tensor, colours: Tensor) -> Tensor:
    """Versions of a picture: uint8 (3, H, W) and (V, 7) -> normalised (V, 3, H, W)."""
    return normalise(torch.stack([recolour(picture, scalars) for scalars in colours]))


class Answers:
    """What a world model says about the versions of one picture.

    Args:
        model: The world model.
        picture: uint8 (3, H, W), on the model's device.
        colours: (V, 7) of the versions.
    """

    def __init__(self, model: AppliesActions, picture: Tensor, colours: Tensor) -> None:
        self.model, self.picture, self.colours = model, picture, colours
        self.versions = make_versions(picture, colours)
        self.features = torch.cat([model.encode_targets(part) for part in self.versions.split(CHUNK)]).float()  # (V, N, D)

    def predictions(self, spoilt: str | None, actions: Tensor | None = None) -> Tensor:
        """Predicted features of all versions.

        Args:
            spoilt: What was done to the source before: one of `DESTRUCTIVE`, or nothing.
            actions: (Q, 7) instead of those that lead to the versions.

        Returns:
            (Q, N, D).
        """
        start = torch.tensor([float(name == spoilt) for name in COLOURS])
        source = self.model.context_encoder(make_versions(self.picture, start[None]))  # (1, N, D)
        actions = self.colours - start if actions is None else actions
        parts = [
            self.model.apply_actions(source.expand(len(part), -1, -1), part)
            for part in actions.to(self.picture.device).split(CHUNK)
        ]
        return torch.cat(parts).float()

    def similarities(self, predictions: Tensor) -> list[Tensor]:
        """Of predictions (Q, N, D) to all versions, in the order of `SIMILARITIES`: (Q, V) each."""
        # In double precision: the cosines of similar versions differ by less than float32 can tell near 1.
        asked, found = predictions.double(), self.features.double()
        patches = [F.normalize(value, dim=-1).flatten(1) for value in (asked, found)]
        pooled = [F.normalize(value.mean(dim=1), dim=-1) for value in (asked, found)]
        return [patches[0] @ patches[1].T / found.shape[1], pooled[0] @ pooled[1].T]


class Ranks(NamedTuple):
    """Mean reciprocal ranks: kind of similarity -> question -> figure, of the questions that were asked."""

    mean: dict[str, dict[str, float]]
    standard_error: dict[str, dict[str, float]]
    """Over pictures."""

    num_pictures: int


class MeanReciprocalRanks(Metric):
    """The means of the protocol above, over versions and pictures."""

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
        self,
        model: AppliesActions,
        picture: Tensor,
        ranges: tuple[float, float, float, float],
        generator: torch.Generator,
        each: bool = True,
    ) -> None:
        """Ask about one picture.

        Args:
            model: The world model.
            picture: uint8 (3, H, W), on the model's device.
            ranges: Greatest change of brightness, contrast, saturation and hue.
            generator: Draws the versions; on the CPU.
            each: Each transformation on its own too, not the jitter and its controls alone.
        """
        answers = Answers(model, picture, draw_bank(ranges, "jitter", generator))
        told = answers.predictions(None)
        self._count("overall", answers, told)
        blind = answers.predictions(None, torch.zeros(1, len(COLOURS)))
        self._count("action_blind", answers, blind.expand(BANK_SIZE, -1, -1))
        self._count("shuffled_actions", answers, told[torch.randperm(BANK_SIZE, generator=generator).to(told.device)])
        if not each:
            return
        for name in DESTRUCTIVE:
            self._count(name, answers, answers.predictions(name))
        for name, greatest in zip(JITTERED, ranges, strict=True):
            if greatest > 0:  # or else all versions are the same
                answers = Answers(model, picture, draw_bank(ranges, name, generator))
                self._count(name, answers, answers.predictions(None))

    def _count(self, question: str, answers: Answers, predictions: Tensor) -> None:
        right = torch.arange(BANK_SIZE, device=predictions.device)
        column = QUESTIONS.index(question)
        for row, similarity in enumerate(answers.similarities(predictions)):
            figure = reciprocal_ranks(similarity, right).mean()
            self.total[row, column] += figure
            self.squares[row, column] += figure.square()
            self.count[row, column] += 1

    def compute(self) -> Ranks:
        """What was asked so far."""
        mean = self.total / self.count
        error = ((self.squares / self.count - mean.square()).clamp(min=0) / (self.count - 1)).sqrt()
        asked = [(column, question) for column, question in enumerate(QUESTIONS) if self.count[0, column] > 0]

        def named(figures: Tensor) -> dict[str, dict[str, float]]:
            return {
                kind: {question: figures[row, column].item() for column, question in asked}
                for row, kind in enumerate(SIMILARITIES)
            }

        return Ranks(named(mean), named(error), int(self.count[0, 0]))


class ActionProbe(RidgeProbe):
    """Is the change still in the features? A ridge regression of the action on the pooled features of two views.

    Every other pair is learned from, the rest are judged. 0 is what invariant features would have.

    Args:
        dim: D.
        action_dim: A.
    """

    def __init__(self, dim: int, action_dim: int) -> None:
        super().__init__(2 * dim, action_dim, ridge=1e-4)

    def update(self, sources: Tensor, targets: Tensor, actions: Tensor) -> None:  # type: ignore[override]
        """Take in pooled features (B, D) of sources and targets, and the actions (B, A) between them."""
        both = torch.cat([sources, targets], dim=1)
        for half in (0, 1):
            RidgeProbe.update(self, both[half::2], actions[half::2], half == 0)


@torch.no_grad()
def nearest_figure(
    model: AppliesActions,
    images: Tensor,
    ranges: tuple[float, float, float, float],
    key: tuple[int, ...],
    count: int = 8,
) -> Figure:
    """Pictures, versions that the predictor is asked for, and which of 256 versions its answer is most like.

    Args:
        model: The world model.
        images: (B, 3, H, W), normalised.
        ranges: Greatest change of brightness, contrast, saturation and hue.
        key: Of the random numbers.
        count: Versions of each picture.
    """
    rows: dict[str, Tensor] = {}
    for number, (image, picture) in enumerate(zip(images, to_uint8(images), strict=True)):
        bank = draw_bank(ranges, "jitter", seeded_generator(*key, BANK_STREAM, number))
        answers = Answers(model, picture, bank)
        similarity = answers.similarities(answers.predictions(None, answers.colours[:count]))[0]
        found = answers.versions[similarity.argmax(dim=1)]
        for title, versions in (("asked", answers.versions[:count]), ("nearest", found)):
            rows[f"{title} {number + 1}"] = to_colours(torch.cat([image[None], versions]))
    return rows_figure(rows)


def to_uint8(images: Tensor) -> Tensor:
    """The bytes that normalised pictures were made of: (B, 3, H, W) floats -> uint8."""
    return (to_colours(images) * 255).round().to(torch.uint8)


def chance(count: int = BANK_SIZE) -> float:
    """Mean reciprocal rank of a predictor that does not listen: H_count / count."""
    return sum(1 / rank for rank in range(1, count + 1)) / count
