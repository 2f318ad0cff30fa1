"""Mean reciprocal rank: an oracle is first, and what does not listen has chance."""

from dataclasses import replace

import pytest
import torch
from conftest import (
    small_iwm,
)
from test_iwm import VIEWS
from torch import Tensor

import jepa_lightning.mean_reciprocal_rank as equivariance
from datamodules import Views
from datamodules.pixel_format import PixelFormat
from datamodules.preprocessing import denormalize
from datamodules.views import recolor
from jepa_lightning.mean_reciprocal_rank import Answers, MeanReciprocalRanks, chance, draw_bank
from jepa_lightning.metrics import reciprocal_ranks


def test_ties_are_counted_fairly() -> None:
    similarities = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    ranks = reciprocal_ranks(similarities, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(ranks, torch.tensor([1.0, 1 / 3, (1 + 1 / 2) / 2, (1 + 1 / 2 + 1 / 3) / 3]).double())
    everything_alike = torch.zeros(256, 256)
    assert reciprocal_ranks(everything_alike, torch.arange(256)).mean().item() == pytest.approx(chance())
    assert chance() == pytest.approx(0.0239, abs=5e-5)


class Oracle(torch.nn.Module):
    """A model whose embeddings are the pixels, and whose predictor applies the action to them: the best there is."""

    def __init__(self, listens: bool) -> None:
        super().__init__()
        self.context_encoder, self.listens = self.embed, listens

    pixels = PixelFormat()

    def embed(self, images: Tensor) -> Tensor:
        self.seen = denormalize(images)
        return images.flatten(2).transpose(1, 2)

    encode_targets = embed

    def apply_actions(self, features: Tensor, actions: Tensor) -> Tensor:
        if not self.listens:
            return features
        side = int(features.shape[1] ** 0.5)
        image = denormalize(features[0].T.unflatten(1, (side, side))[None])[0]
        made = equivariance.make_versions(
            image, actions * (torch.arange(7) < 4), self.pixels
        )  # it cannot undo what degrades
        return made.flatten(2).transpose(1, 2)


def ranks_of(model: torch.nn.Module, **settings) -> equivariance.Ranks:
    ranks = MeanReciprocalRanks()
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=generator)
        ranks.update(model, image, VIEWS, generator, **settings)
    return ranks.compute()


def test_an_oracle_is_first_and_one_that_ignores_actions_has_chance() -> None:
    oracle, deaf = ranks_of(Oracle(True)), ranks_of(Oracle(False))
    for kind in ("patch", "pooled"):
        for question in ("overall", "brightness", "contrast", "saturation", "hue"):
            assert oracle.mean[kind][question] > 0.9, question  # versions that are the same in uint8 share a rank
            assert deaf.mean[kind][question] == pytest.approx(chance(), rel=0.02), question
        assert oracle.mean[kind]["action_blind"] == pytest.approx(chance(), rel=0.02)
        assert abs(oracle.mean[kind]["shuffled_actions"] - chance()) < 0.01
    assert oracle.num_images == 2 and oracle.mean["patch"]["grayscale"] < 0.5, "what is gone cannot be restored"


def test_without_conditioning_there_is_nothing_but_chance() -> None:
    ranks, generator = MeanReciprocalRanks(), torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=generator)
    ranks.update(small_iwm(conditioning="none").eval(), image, VIEWS, generator, each=False)
    for kind in ("patch", "pooled"):
        for question, figure in ranks.compute().mean[kind].items():
            assert figure == pytest.approx(chance(), rel=0.01), question


def test_only_what_is_asked_is_ranked() -> None:
    assert set(ranks_of(Oracle(True), each=False).mean["patch"]) == {"overall", "action_blind", "shuffled_actions"}


def test_candidates_are_functions_of_the_generator_and_vary_what_they_say() -> None:
    candidates = draw_bank(VIEWS, "jitter", torch.Generator().manual_seed(5))
    state = torch.get_rng_state()
    assert torch.equal(candidates, draw_bank(VIEWS, "jitter", torch.Generator().manual_seed(5)))
    assert torch.equal(state, torch.get_rng_state()), "the global generator is left alone"
    assert candidates.shape == (256, 7)
    assert (candidates[:, :4].std(0) > 0.4).all() and not candidates[:, 4:].any()
    hue = draw_bank(VIEWS, "hue", torch.Generator().manual_seed(5))
    assert hue[:, 3].std() > 0.4 and not hue[:, [0, 1, 2, 4, 5, 6]].any()


def test_answers_start_from_a_degraded_source_and_undo_it() -> None:
    oracle = Oracle(True)
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    answers = Answers(oracle, image, draw_bank(VIEWS, "jitter", torch.Generator().manual_seed(0)), VIEWS)
    asked: list[Tensor] = []
    oracle.apply_actions = lambda features, actions: asked.append(actions) or features
    answers.predictions(answers.actions("grayscale"), "grayscale")
    assert torch.equal(oracle.seen[0], recolor(image, torch.tensor([0.0, 0, 0, 0, 1, 0, 0])))
    assert (torch.cat(asked)[:, 4] == -1).all() and torch.equal(torch.cat(asked)[:, :4], answers.colors[:, :4])


def test_a_model_of_the_way_back_is_asked_for_the_way_back() -> None:
    """With source_from=target, a brightness scalar of -s undoes a factor of 1 + 0.4 s."""

    class Undoes(Oracle):
        def apply_actions(self, features: Tensor, actions: Tensor) -> Tensor:
            return torch.stack([row / (1 - 0.4 * action[0]) for row, action in zip(features, actions, strict=True)])

        def embed(self, images: Tensor) -> Tensor:  # linear in the brightness, and never black
            return denormalize(images).flatten(2).transpose(1, 2).float() + torch.tensor([1.0, 0.0, 0.0])

    views = Views(jitter=(0.4, 0.0, 0.0, 0.0), source_from="target")
    image = torch.randint(0, 140, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for settings, first in ((views, True), (replace(views, source_from="shared"), False)):
        answers = Answers(Undoes(True), image, draw_bank(views, "jitter", torch.Generator().manual_seed(0)), settings)
        wanted = (1 + 0.4 * answers.colors[:, 0]) * 100
        given = answers.predictions(answers.actions())[:, 0, 1] / image[1, 0, 0] * 100
        assert torch.allclose(given, wanted, rtol=1e-4) == first
