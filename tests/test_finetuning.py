"""Fine-tuning: what is minimized, at which rates, and what is reported."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import small_ijepa, small_images, trainer
from torch import nn
from torch.nn import functional as F
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy

from datamodules import ImageBatch
from jepa_lightning.probes import FineTuning
from jepa_lightning.probes.images.finetuning import EncoderClassifier, arm_accuracies

BATCH = ImageBatch(torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3, (0, 0, 0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, image_root: Path) -> str:
    root = tmp_path_factory.mktemp("finetuning")
    run = trainer(root, max_steps=1)
    run.fit(small_ijepa(encoder_depth=2), small_images(image_root))
    run.save_checkpoint(root / "ijepa.ckpt")
    return str(root / "ijepa.ckpt")


def logged(probe: FineTuning) -> dict[str, tuple[float, dict]]:
    """Where the probe's logs go: each value, and how it is logged."""
    found: dict[str, tuple[float, dict]] = {}

    def log_dict(values: dict, **how: object) -> None:
        found.update({name: (torch.as_tensor(value).detach().item(), how) for name, value in values.items()})

    probe.log_dict, probe.log = log_dict, lambda name, value, **how: log_dict({name: value}, **how)
    return found


def test_accuracies_of_arms_have_their_errors_and_start_anew() -> None:
    evaluated, accuracies = SumMetric(), {name: MulticlassAccuracy(2, average="micro") for name in ("one", "other")}
    for labels in (torch.tensor([0, 1, 1]), torch.tensor([1])):
        evaluated.update(len(labels))
        accuracies["one"].update(torch.ones_like(labels), labels)
        accuracies["other"].update(labels, labels)
    figures, count = arm_accuracies(accuracies, evaluated)
    assert count == 4 and list(figures) == ["one", "other"]
    assert figures["one"] == {"accuracy": 0.75, "standard_error": pytest.approx(math.sqrt(0.75 * 0.25 / 4))}
    assert figures["other"] == {"accuracy": 1.0, "standard_error": 0.0}
    evaluated.update(1)
    for metric in accuracies.values():
        metric.update(torch.tensor([0]), torch.tensor([1]))
    figures, count = arm_accuracies(accuracies, evaluated)
    assert count == 1 and figures["other"]["accuracy"] == 0


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_nothing_evaluated_is_not_divided_by() -> None:
    figures, count = arm_accuracies({"one": MulticlassAccuracy(2, average="micro")}, SumMetric())
    assert count == 1 and figures["one"]["standard_error"] == 0


def test_a_classifier_averages_patches_and_starts_near_zero() -> None:
    encoder = nn.Identity()
    encoder.dim = 500
    torch.manual_seed(0)
    classifier = EncoderClassifier(encoder, 40)
    assert classifier.head.weight.shape == (40, 500) and not classifier.head.bias.any()
    assert classifier.head.weight.std().item() == pytest.approx(0.01, rel=0.02)
    tokens = torch.randn(2, 7, 500)
    torch.testing.assert_close(classifier(tokens), tokens.mean(dim=1) @ classifier.head.weight.T)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_both_networks_minimize_a_smoothed_cross_entropy_of_their_own(checkpoint: str, smoothing: float) -> None:
    probe = FineTuning(checkpoint, num_classes=3, label_smoothing=smoothing)
    for network in probe.networks.values():
        nn.init.normal_(network.head.weight)
    found = logged(probe)
    loss = probe.training_step(BATCH, 0)
    expected = {}
    for name, network in probe.networks.items():
        scores = network(BATCH.images).log_softmax(dim=1)
        right, all_of_them = scores[torch.arange(6), BATCH.labels], scores.mean(dim=1)
        expected[name] = -((1 - smoothing) * right + smoothing * all_of_them).mean().item()
    bar = {"prog_bar": True}
    assert found == {f"train/loss_{name}": (pytest.approx(value, rel=1e-4), bar) for name, value in expected.items()}
    assert loss.item() == pytest.approx(sum(expected.values()), rel=1e-4)
    assert expected["finetuned"] != pytest.approx(expected["scratch"], rel=1e-2)


def test_validation_evaluates_both_and_follows_the_fine_tuned_one(checkpoint: str) -> None:
    probe = FineTuning(checkpoint, num_classes=3).eval()
    with torch.no_grad():
        probe.networks["finetuned"].head.bias[1] = 50.0  # always class 1: right on 2 of 6
        probe.networks["scratch"].head.bias[0] = 50.0
        found = logged(probe)
        labels = torch.tensor([1, 1, 2, 2, 0, 0])
        probe.validation_step(BATCH._replace(labels=labels), 0)
        probe.validation_step(BATCH._replace(labels=torch.tensor([0, 0, 0, 0, 0, 2])), 1)
        scores = probe.networks["finetuned"](BATCH.images)
    loss = F.cross_entropy(scores, torch.tensor([0, 0, 0, 0, 0, 2])).item()
    # Averaged over images and processes, whatever Lightning guesses of the batch.
    assert found == {"val/loss": (pytest.approx(loss, rel=1e-5), {"sync_dist": True, "batch_size": 6})}
    probe.on_validation_epoch_end()
    assert found["val/accuracy_finetuned"] == (pytest.approx(2 / 12), {"prog_bar": True})
    assert found["val/accuracy_scratch"] == (pytest.approx(7 / 12), {"prog_bar": True})


def test_the_report_counts_every_image_once(checkpoint: str, tmp_path: Path) -> None:
    probe = FineTuning(checkpoint, num_classes=3).eval()
    probe._trainer = SimpleNamespace(is_global_zero=True, default_root_dir=str(tmp_path))
    probe.log = lambda *_, **__: None
    with torch.no_grad():
        probe.networks["finetuned"].head.bias[1] = 50.0
        for batch in (BATCH, BATCH._replace(images=BATCH.images[:1], labels=torch.tensor([1]))):
            probe.test_step(batch, 0)
    probe.on_test_epoch_end()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["judged"] == "on 7 held-out images" and report["checkpoint"] == checkpoint
    assert report["accuracy"]["finetuned"] == {
        "accuracy": pytest.approx(3 / 7),
        "standard_error": pytest.approx(math.sqrt(3 / 7 * 4 / 7 / 7)),
    }
    assert list(report["accuracy"]) == ["finetuned", "scratch"]


def optimizer_of(probe: FineTuning, steps: int = 10) -> dict:
    probe._trainer = SimpleNamespace(estimated_stepping_batches=steps)
    return probe.configure_optimizers()


def test_rates_fall_towards_the_pixels_by_block(checkpoint: str) -> None:
    settings = {"layer_decay": 0.5, "learning_rate": 0.2, "weight_decay": 0.3, "warmup_fraction": 0.0}
    probe = FineTuning(checkpoint, num_classes=3, **settings)
    found = optimizer_of(probe)
    optimizer = found["optimizer"]
    assert isinstance(optimizer, torch.optim.AdamW)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, base in (("finetuned", 0.5), ("scratch", 1.0)):
        network = probe.networks[name]
        vit = network.encoder.vit
        layers = {0: vit.patch_embed.proj, 1: vit.blocks[0].attn.qkv, 2: vit.blocks[1].attn.qkv}
        for depth, layer in layers.items():
            assert groups[id(layer.weight)]["initial_lr"] == pytest.approx(0.2 * base ** (2 - depth))
            assert groups[id(layer.weight)]["weight_decay"] == 0.3 and groups[id(layer.bias)]["weight_decay"] == 0
        for parameter, decay in ((network.head.weight, 0.3), (network.head.bias, 0.0)):
            assert groups[id(parameter)]["initial_lr"] == 0.2 and groups[id(parameter)]["weight_decay"] == decay
            assert groups[id(parameter)]["name"].startswith(f"{name}_head")
    names = [group["name"] for group in optimizer.param_groups]
    assert len(set(names)) == len(names) and {name.partition("_")[0] for name in names} == {"finetuned", "scratch"}
    assert len(groups) == len(list(probe.networks.parameters()))


def test_rates_rise_and_fall_over_the_whole_training(checkpoint: str) -> None:
    probe = FineTuning(checkpoint, num_classes=3, learning_rate=0.2, warmup_fraction=0.4)
    found = optimizer_of(probe)
    scheduler, rates = found["lr_scheduler"]["scheduler"], []
    for _ in range(10):
        rates.append(found["optimizer"].param_groups[-1]["lr"])
        found["optimizer"].step()
        scheduler.step()
    assert max(rates) == rates[4] == pytest.approx(0.2) and rates[0] == pytest.approx(0.002) and rates[9] < 0.02


def test_defaults_are_those_that_results_were_made_with(checkpoint: str) -> None:
    probe = FineTuning(checkpoint)
    assert probe.num_classes is None and not hasattr(probe, "networks"), "classes are the data's"
    probe.set_classes(10)
    defaults = {
        "num_classes": 10,
        "encoder": "target",
        "learning_rate": 1e-3,
        "warmup_fraction": 0.1,
        "layer_decay": 0.75,
        "weight_decay": 0.05,
        "label_smoothing": 0.1,
    }
    assert {name: probe.hparams[name] for name in defaults} == defaults
    assert probe.networks["scratch"](BATCH.images).shape == (6, 10)
    assert probe.training and all(module.training for module in probe.networks.modules())
    probe.eval()
    assert not any(module.training for module in probe.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 1}, "model.num_classes=1"),
        ({"learning_rate": 0.0}, "model.learning_rate=0.0"),
        ({"learning_rate": -1.0}, "model.learning_rate=-1.0"),
        ({"layer_decay": 0.0}, "model.layer_decay=0.0"),
        ({"layer_decay": 1.1}, "model.layer_decay=1.1"),
        ({"label_smoothing": 1.0}, "model.label_smoothing=1.0"),
        ({"label_smoothing": -0.1}, "model.label_smoothing=-0.1"),
        ({"warmup_fraction": 1.0}, "model.warmup_fraction=1.0"),
        ({"warmup_fraction": -0.1}, "model.warmup_fraction=-0.1"),
        ({"weight_decay": -0.1}, "model.weight_decay=-0.1"),
    ],
)
def test_numbers_out_of_their_range_are_refused(checkpoint: str, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FineTuning(checkpoint, **({"num_classes": 3} | change))


def test_numbers_at_the_ends_of_their_ranges_are_taken(checkpoint: str) -> None:
    ends = {"layer_decay": 1.0, "label_smoothing": 0.0, "warmup_fraction": 0.0, "weight_decay": 0.0, "learning_rate": 5.0}
    assert FineTuning(checkpoint, 3, **ends).learning_rate == 5.0
