"""A baseline is no model in disguise: probes read the encoder asked for, and a randomly initialized one."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import small_data, small_ijepa, small_images, small_iwm, small_model, small_views, trainer
from torch import Tensor, nn

from jepa_lightning.classifiers import directions, vote
from jepa_lightning.probes import (
    AttentiveProbe,
    CompletionProbe,
    DecoderProbe,
    EquivarianceProbe,
    FineTuning,
    KNNProbe,
    LinearProbe,
)
from jepa_lightning.weights.checkpoints import load_jepa

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def moved(network: nn.Module, by: float) -> None:
    """As if trained: every parameter is another, and the two encoders of a model are not the same."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(by * torch.randn_like(parameter))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, image_root: Path) -> dict[str, str]:
    """An I-JEPA, an IWM and a pendulum JEPA whose target encoders, context encoders and fresh encoders all differ."""
    root = tmp_path_factory.mktemp("baselines")
    families = {
        "ijepa": (small_ijepa(encoder_depth=2), small_images(image_root)),
        "iwm": (small_iwm(), small_views(image_root)),
        "pendulum": (small_model(), small_data()),
    }
    for name, (jepa, data) in families.items():
        run = trainer(root, max_steps=1)
        run.fit(jepa, data)
        moved(jepa.target_encoder, 0.02)
        moved(jepa.context_encoder, 0.02)
        run.save_checkpoint(root / f"{name}.ckpt")
    return {name: str(root / f"{name}.ckpt") for name in families}


def same(mine: Tensor, theirs: Tensor) -> bool:
    return mine.shape == theirs.shape and torch.allclose(mine, theirs, atol=1e-4)


def mean(network: nn.Module) -> Tensor:
    return network(IMAGES).mean(dim=1)


READERS: dict[type, Callable] = {
    LinearProbe: lambda probe: (probe.features(IMAGES)["last"], probe.features(IMAGES)["untrained_last"], mean),
    KNNProbe: lambda probe: (probe.features(IMAGES)["features"], probe.features(IMAGES)["untrained"], mean),
    AttentiveProbe: lambda probe: (
        probe.inputs(IMAGES)["attentive"],
        probe.inputs(IMAGES)["untrained"],
        lambda net: net(IMAGES),
    ),
    FineTuning: lambda probe: (mean(probe.networks["finetuned"].encoder), mean(probe.networks["scratch"].encoder), mean),
}
"""What each probe takes of the model and of its baseline, and what an encoder would give there."""


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("encoder", ["target", "context"])
def test_probes_of_images_read_the_encoder_asked_for_and_a_random_one(kind: type, encoder: str, checkpoints: dict) -> None:
    jepa = load_jepa(checkpoints["ijepa"]).eval()
    probe = kind(checkpoints["ijepa"], num_classes=2, encoder=encoder).eval()
    with torch.no_grad():
        model, baseline, read = READERS[kind](probe)
        found = {
            name: read(network) for name, network in (("target", jepa.target_encoder), ("context", jepa.context_encoder))
        }
        assert same(model, found[encoder])
        assert not any(same(baseline, features) for features in found.values()), "the baseline is the model"
        assert not same(found["target"], found["context"])


def test_the_random_network_is_of_the_same_kind_and_the_same_each_time(checkpoints: dict) -> None:
    probes = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        probes.append(KNNProbe(checkpoints["ijepa"], num_classes=2))
    first, second = (dict(probe.untrained.named_parameters()) for probe in probes)
    assert {name: p.shape for name, p in first.items()} == {n: p.shape for n, p in probes[0].encoder.named_parameters()}
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_last_four_blocks_of_the_baseline_are_its_own(checkpoints: dict) -> None:
    probe = LinearProbe(checkpoints["ijepa"], num_classes=2).eval()
    found = probe.features(IMAGES)
    expected = torch.cat([tokens.mean(dim=1) for tokens in probe.untrained.last_blocks(IMAGES, 4)], dim=1)
    assert same(found["untrained_last_four"], expected) and not same(found["untrained_last_four"], found["last_four"])


def test_completion_decodes_its_baseline_from_a_random_encoder(checkpoints: dict) -> None:
    probe = CompletionProbe(checkpoints["ijepa"], width=64, depth=1).eval()
    normalized = nn.functional.layer_norm(probe.untrained(IMAGES), (192,))
    assert same(probe.features(IMAGES, "untrained"), normalized)
    assert not same(probe.features(IMAGES, "untrained"), probe.features(IMAGES))


def test_equivariance_is_compared_with_a_random_encoder(checkpoints: dict) -> None:
    probe = EquivarianceProbe(checkpoints["iwm"]).eval()
    target = load_jepa(checkpoints["iwm"]).target_encoder.eval()
    with torch.no_grad():
        assert same(mean(probe.networks["encoder"]), mean(target))
        assert not same(mean(probe.networks["untrained"]), mean(target))


@pytest.mark.parametrize("encoder", ["target", "context"])
def test_probes_of_the_pendulum_read_the_encoder_asked_for_and_a_random_one(encoder: str, checkpoints: dict) -> None:
    jepa = load_jepa(checkpoints["pendulum"])
    encoders = {"target": jepa.target_encoder, "context": jepa.context_encoder}
    data = small_data()
    batch = data.observe(data.trajectories("test"))
    found = DecoderProbe(checkpoints["pendulum"], encoder=encoder, width=4).features(batch)
    with torch.no_grad():
        features = {name: jepa.encode_windows(network, batch.observations) for name, network in encoders.items()}
    assert same(found["jepa"], features[encoder]) and not same(features["target"], features["context"])
    for baseline in ("random_encoder", "pca"):
        assert not any(same(found[baseline], value) for value in features.values()), f"{baseline} is the model"


class Brightness(nn.Module):
    """An encoder whose embeddings are two known numbers an image."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign = sign

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1, 2)."""
        value = self.sign * images.mean(dim=(1, 2, 3))
        return torch.stack([value, value.square()], dim=1)[:, None]


def test_neighbors_vote_by_training_images_that_are_not_cut(checkpoints: dict, image_root: Path, tmp_path: Path) -> None:
    """The memory bank is what validation would see of the training images, and its mean alone centers the queries."""
    probe = KNNProbe(checkpoints["ijepa"], num_classes=2, num_neighbors=3, temperature=0.5)
    probe.encoder, probe.untrained = Brightness(1.0), Brightness(-1.0)
    data = small_images(image_root, val_fraction=0.4, crop_scale=(0.05, 0.1), batch_size=3)
    run = trainer(tmp_path)
    run.test(probe, data, verbose=False)
    memory_bank, bank_labels, held_out, answers = [], [], [], []
    for images, labels, loader in (
        (memory_bank, bank_labels, data.plain_train_dataloader()),
        (held_out, answers, data.val_dataloader()),
    ):
        for batch in loader:
            images.append(data.on_after_batch_transfer(batch, 0).images)
            labels.append(batch.labels)
    features, queries = (Brightness(1.0)(torch.cat(images))[:, 0] for images in (memory_bank, held_out))
    middle = features.mean(dim=0)
    votes = vote(directions(features, middle), torch.cat(bank_labels), directions(queries, middle), 3, 0.5)
    expected = (votes == torch.cat(answers)).float().mean().item()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["accuracy"]["features"]["accuracy"] == pytest.approx(expected)
    assert 0 < expected < 1, "else it would say little"


def test_norms_of_the_linear_probe_are_those_of_training(checkpoints: dict) -> None:
    """What is evaluated is not standardized by itself: an image's scores do not depend on the others of its batch."""
    probe = LinearProbe(checkpoints["ijepa"], num_classes=2).train()
    for _ in range(3):
        probe.logits(IMAGES)
    before = copy.deepcopy(probe.norms.state_dict())
    probe.eval()
    together = probe.logits(5 * IMAGES)
    alone = torch.cat([probe.logits(5 * image[None]) for image in IMAGES])
    torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in probe.norms.state_dict().items())


def test_what_is_reported_was_not_chosen_on(checkpoints: dict) -> None:
    """Of two classifiers the first is better on the images that choose; what it does on the others is the figure."""
    probe = LinearProbe(checkpoints["ijepa"], num_classes=2, learning_rates=(0.1, 0.2), weight_decays=(0.0,))
    labels = torch.zeros(8, dtype=torch.int64)
    first = torch.tensor([0, 1, 0, 1, 0, 1, 0, 0])  # right on 4 of 4 that choose and on 1 of 4 that report
    second = torch.tensor([0, 0, 0, 0, 0, 0, 1, 0])  # right on 3 of 4 and on 4 of 4
    probe.accuracy.update(torch.stack([first, second] * len(probe.names), dim=1), labels)
    figures, count = probe.chosen()
    assert count == 4 and list(figures) == list(LinearProbe.names)
    for found in figures.values():
        assert found["accuracy"] == 0.25 and found["learning_rate"] == 0.1
        assert found["standard_error"] == pytest.approx((0.25 * 0.75 / 4) ** 0.5)
