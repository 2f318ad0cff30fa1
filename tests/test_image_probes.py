"""Probes of images: attention, neighbors, fine-tuning, completion."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, ROOT, small_ijepa, small_images, trainer, write_images
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jepa_lightning.figures import feature_colors, nearest_images
from jepa_lightning.networks.decoders import PatchDecoder
from jepa_lightning.probes import AttentiveProbe, CompletionProbe, FineTuning, KNNProbe, LinearProbe
from jepa_lightning.probes.images.attentive import AttentivePool
from jepa_lightning.weights.exporting import export_weights
from jepa_lightning.weights.importing import import_weights


@pytest.fixture
def checkpoint(tmp_path: Path, image_root: Path) -> str:
    run = trainer(tmp_path, max_steps=1, enable_checkpointing=True)
    run.fit(small_ijepa(), small_images(image_root))
    run.save_checkpoint(tmp_path / "ijepa.ckpt")
    return str(tmp_path / "ijepa.ckpt")


def images_in_tensorboard(folder: Path) -> set[str]:
    events = EventAccumulator(str(folder)).Reload()
    return set(events.Tags()["images"])


def fit_and_test(probe, tmp_path: Path, image_root: Path, epochs: int) -> dict:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    run = trainer(tmp_path, max_epochs=epochs, limit_val_batches=1.0, logger=logger, check_val_every_n_epoch=epochs)
    data = small_images(image_root, val_fraction=0.4)
    run.fit(probe, data)
    run.test(probe, data, verbose=False)
    return json.loads((tmp_path / "report.json").read_text())


def test_attentive_probe(tmp_path: Path, image_root: Path, checkpoint: str) -> None:
    probe = AttentiveProbe(checkpoint, num_classes=2)
    before = {name: value.clone() for name, value in probe.encoder.state_dict().items()}
    report = fit_and_test(probe, tmp_path, image_root, 8)
    assert report["accuracy"]["attentive"]["accuracy"] == 1, "the two classes differ in color"
    assert set(report["accuracy"]) == {"attentive", "untrained"}
    for name, value in probe.encoder.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} is not frozen"
    assert "attention" in images_in_tensorboard(tmp_path)


def test_the_attention_shown_is_the_attention_used() -> None:
    torch.manual_seed(0)
    pool = AttentivePool(24, 3, 2).eval()
    torch.nn.init.normal_(pool.pool.latent)
    tokens = torch.randn(2, 5, 24)
    weights = pool.attention(tokens)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2))
    # With one head, values that are the tokens' places make the pooled value the mean place under the weights.
    single = AttentivePool(4, 1, 2).eval()
    torch.nn.init.normal_(single.pool.latent)
    found = {}
    single.pool.proj.register_forward_hook(lambda module, inputs, output: found.update(pooled=inputs[0]))
    tokens = torch.randn(2, 5, 4)
    single(tokens)
    values = single.pool.kv(single.norm(tokens))[..., 4:]
    expected = torch.einsum("bn,bnd->bd", single.attention(tokens), values)
    torch.testing.assert_close(found["pooled"].flatten(1), expected)


def test_neighbors_need_no_fit(tmp_path: Path, image_root: Path, checkpoint: str) -> None:
    run = trainer(tmp_path)
    run.test(KNNProbe(checkpoint, num_classes=2), small_images(image_root), verbose=False)
    report = json.loads((tmp_path / "report.json").read_text())
    assert {name: figures["accuracy"] for name, figures in report["accuracy"].items()} == {
        "features": 1,
        "untrained": 1,
        "pixels": 1,
    }
    assert report["judged"] == "on 6 held-out images, against 24 training images"


def test_the_memory_bank_is_not_what_is_evaluated(tmp_path: Path, image_root: Path) -> None:
    data = small_images(image_root)
    data.setup("test")
    memory_bank = torch.cat([batch.images for batch in data.plain_train_dataloader()])
    held_out = torch.cat([batch.images for batch in data.test_dataloader()])
    assert len(memory_bank) == 24 and len(held_out) == 6
    assert not (memory_bank[:, None] == held_out[None]).flatten(2).all(dim=2).any()


def test_fine_tuning_trains_the_encoder_and_its_baseline(tmp_path: Path, image_root: Path, checkpoint: str) -> None:
    probe = FineTuning(checkpoint, num_classes=2, layer_decay=0.5)
    before = {name: value.clone() for name, value in probe.networks.named_parameters()}
    report = fit_and_test(probe, tmp_path, image_root, 10)
    assert set(report["accuracy"]) == {"finetuned", "scratch"}
    assert report["accuracy"]["finetuned"]["accuracy"] == 1
    assert all(not torch.equal(value, before[name]) for name, value in probe.networks.named_parameters())


def test_layers_decay_towards_the_pixels(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = FineTuning(checkpoint, num_classes=2, layer_decay=0.5, learning_rate=1.0, warmup_fraction=0.0)
    probe._trainer = object()
    monkeypatch.setattr("jepa_lightning.probes.images.finetuning.total_optimizer_steps", lambda _: 10)
    optimizer = probe.configure_optimizers()["optimizer"]
    rate = {id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    finetuned, scratch = probe.networks["finetuned"], probe.networks["scratch"]
    vit = finetuned.encoder.vit
    assert rate[id(finetuned.head.weight)] == 1.0
    assert rate[id(vit.patch_embed.proj.weight)] == 0.5 * rate[id(vit.blocks[0].attn.qkv.weight)]
    assert rate[id(vit.blocks[0].attn.qkv.weight)] == rate[id(vit.norm.weight)] == 1.0
    assert {rate[id(p)] for p in scratch.parameters()} == {1.0}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in finetuned.named_parameters():
        assert (decay[id(parameter)] > 0) == (parameter.ndim > 1), name
    assert len(rate) == len(list(probe.networks.parameters())), "every parameter is in one group"


def test_patches_and_decoding_are_inverse() -> None:
    decoder = PatchDecoder((2, 3), 8, 4, 8, 1)
    images = torch.randn(2, 3, 8, 12)
    cut = decoder.patches(images)
    assert cut.shape == (2, 6, 48)
    torch.testing.assert_close(cut[:, 4].view(2, 3, 4, 4), images[:, :, 4:, 4:8])
    # A decoder whose transformer hands its input through would decode it to itself.
    decoder = PatchDecoder((2, 3), 48, 4, 48, 0)
    decoder.positions.zero_()
    decoder.norm = torch.nn.Identity()
    for layer in (decoder.embed, decoder.paint):
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    torch.testing.assert_close(decoder(cut), images)


def test_completion(tmp_path: Path, image_root: Path, checkpoint: str) -> None:
    probe = CompletionProbe(checkpoint, width=64, depth=1)
    frozen = {
        (place, name): value.clone()
        for place, part in enumerate((probe.encoder, probe.context_encoder, probe.predictor, probe.untrained))
        for name, value in part.state_dict().items()
    }
    report = fit_and_test(probe, tmp_path, image_root, 2)
    assert set(report["hidden_mse"]) == set(CompletionProbe.titles)
    assert all(0 < value < 10 for value in report["hidden_mse"].values())
    with Image.open(tmp_path / "completion.png") as figure:
        assert min(figure.size) > 300
    assert "completion" in images_in_tensorboard(tmp_path)
    for part in (probe.encoder, probe.context_encoder, probe.predictor):
        assert not any(p.requires_grad for p in part.parameters()) and not part.training
    for place, part in enumerate((probe.encoder, probe.context_encoder, probe.predictor, probe.untrained)):
        assert all(torch.equal(value, frozen[place, name]) for name, value in part.state_dict().items())


def test_a_completion_never_sees_the_hidden_pixels(checkpoint: str) -> None:
    probe = CompletionProbe(checkpoint, width=64, depth=1).eval()
    images = torch.randn(2, 3, 16, 16)
    first = probe.complete(images, torch.Generator().manual_seed(0))
    assert not (first.visible & first.targets).any() and first.targets.any(dim=1).all()
    hidden = (~first.visible).float().view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    changed = images * (1 - hidden) + 9 * hidden
    second = probe.complete(changed, torch.Generator().manual_seed(0))
    torch.testing.assert_close(second.completed, first.completed)
    assert not torch.allclose(second.reconstructed, first.reconstructed)


def test_nothing_is_evaluated_before_it_is_fitted(tmp_path: Path, image_root: Path, checkpoint: str) -> None:
    for probe in (LinearProbe(checkpoint, 2), FineTuning(checkpoint, 2), CompletionProbe(checkpoint)):
        with pytest.raises(ValueError, match="was never fitted: run `fit` first"):
            trainer(tmp_path).test(probe, small_images(image_root), verbose=False)
    assert not (tmp_path / "report.json").exists()


def test_nothing_is_frozen_in_fine_tuning(checkpoint: str) -> None:
    probe = FineTuning(checkpoint, 2)
    assert all(module.training for module in probe.networks.modules())
    assert all(parameter.requires_grad for parameter in probe.networks.parameters())


def test_an_encoder_alone_completes_nothing(tmp_path: Path, checkpoint: str) -> None:
    export_weights(checkpoint, str(tmp_path / "encoder.safetensors"))
    import_weights(str(tmp_path / "encoder.safetensors"), str(tmp_path / "imported.ckpt"))
    with pytest.raises(ValueError, match="its predictor is untrained"):
        CompletionProbe(str(tmp_path / "imported.ckpt"))


def test_predictions_of_unnormalized_targets_are_normalized(tmp_path: Path, image_root: Path) -> None:
    run = trainer(tmp_path, max_steps=1, enable_checkpointing=True)
    run.fit(small_ijepa(normalize_targets=False), small_images(image_root))
    run.save_checkpoint(tmp_path / "ijepa.ckpt")
    probe = CompletionProbe(str(tmp_path / "ijepa.ckpt"))
    masks = probe.masks.draw(2, torch.Generator().manual_seed(0))
    context = torch.randn(2, masks.context.shape[1], 192)
    predicted = probe._predict(context, masks.context, masks.targets)
    assert predicted.std(dim=-1).mean() == pytest.approx(1, abs=0.01)


def test_probes_need_labels(tmp_path: Path, checkpoint: str) -> None:
    write_images(tmp_path / "flat", 8)
    with pytest.raises(ValueError, match="flat has no folders of classes, and AttentiveProbe needs labels"):
        trainer(tmp_path, max_steps=1).fit(AttentiveProbe(checkpoint, 2), small_images(tmp_path / "flat"))


SCRIPT = """
import sys
import torch
from conftest import small_images, trainer
from jepa_lightning.probes import CompletionProbe, FineTuning, LinearProbe, KNNProbe

out, checkpoint, root = sys.argv[1:]
for kind in (LinearProbe, FineTuning, CompletionProbe, KNNProbe):
    probe = kind(checkpoint) if kind is CompletionProbe else kind(checkpoint, num_classes=2)
    run = trainer(f"{out}/{type(probe).__name__}", devices=2, strategy="ddp", max_epochs=1, limit_val_batches=1.0)
    if probe.needs_fit:
        run.fit(probe, small_images(root, batch_size=2))
    run.test(probe, small_images(root, batch_size=2), verbose=False)
torch.distributed.destroy_process_group()  # torch asks for it before the interpreter ends
"""


def test_two_processes_write_one_report_on_all_images(tmp_path: Path, image_root: Path, checkpoint: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    environment.pop("LOCAL_RANK", None)
    arguments = [sys.executable, str(tmp_path / "script.py"), str(tmp_path), checkpoint, str(image_root)]
    done = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-9000:]
    # Each process has 3 images in batches of 2 and 1; of each batch, the second image is one to report on.
    evaluated = {"LinearProbe": "on 2 held-out", "FineTuning": "on 6 held-out", "KNNProbe": "on 6 held-out"}
    for name, text in evaluated.items():
        assert json.loads((tmp_path / name / "report.json").read_text())["judged"].startswith(text), name
        assert done.stdout.count(f"{name}/report.md") == 1, "one process writes, and says so"
    assert (tmp_path / "CompletionProbe" / "report.md").exists()


def test_figures_of_embeddings_need_no_bfloat16() -> None:
    features = torch.randn(8, 16, 24, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        colors = feature_colors(features, (4, 4), (16, 16))
        rows = nearest_images(torch.rand(8, 3, 16, 16), features.mean(dim=1), 4)
    assert colors.shape == (8, 3, 16, 16) and 0 <= colors.min() and colors.max() <= 1
    assert list(rows) == ["query", "nearest 1", "nearest 2", "nearest 3"]


def test_impossible_values_are_refused(checkpoint: str) -> None:
    with pytest.raises(ValueError, match="model.num_neighbors=0"):
        KNNProbe(checkpoint, num_neighbors=0)
    with pytest.raises(ValueError, match="model.layer_decay=0"):
        FineTuning(checkpoint, layer_decay=0)
    with pytest.raises(ValueError, match="model.width=80"):
        CompletionProbe(checkpoint, width=80)
    with pytest.raises(ValueError, match="model.encoder='both'"):
        AttentiveProbe(checkpoint, encoder="both")


def test_ijepa_shows_images_in_tensorboard(tmp_path: Path, image_root: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=1.0, logger=logger)
    run.fit(small_ijepa(), small_images(image_root))
    assert images_in_tensorboard(tmp_path) == {"masks and features", "nearest images"}
    assert "val/linear_accuracy" in run.callback_metrics and "val/knn_accuracy" in run.callback_metrics


@pytest.mark.parametrize("family", FAMILIES)
def test_figures_of_a_run_without_tensorboard_are_files(tmp_path: Path, image_root: Path, family: str) -> None:
    model, data = FAMILIES[family]
    run = trainer(tmp_path, max_epochs=2, limit_val_batches=1.0)
    run.fit(model(), data(image_root))
    tags = {"masks-and-features", "nearest-images"} | ({"nearest-versions"} if family == "iwm" else set())
    found = {str(path.relative_to(tmp_path / "figures")) for path in (tmp_path / "figures").rglob("*.png")}
    assert found == {f"{tag}/step-{step:08d}.png" for tag in tags for step in (6, 12)}
