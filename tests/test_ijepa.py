"""I-JEPA: what predicts what, and the guarantees of every JEPA: EMA, resume, processes, alarm, clear errors."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, parameters_equal, small_ijepa, small_pictures, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from test_ema import Shadow
from torch.nn import functional as F

from callbacks import CollapseAlarm, CollapseWarning
from datamodules import ImageBatch
from jepa_lightning.checkpoints import load_jepa
from jepa_lightning.networks.vit import ViTEncoder, attend_plainly, sincos_positions, take


def batch(count: int = 3, size: int | tuple[int, int] = 16) -> ImageBatch:
    shape = (size, size) if isinstance(size, int) else size
    images = torch.randn(count, 3, *shape, generator=torch.Generator().manual_seed(0))
    return ImageBatch(images, torch.zeros(count, dtype=torch.int64), (0, 0, 0))


def test_the_context_encoder_sees_the_visible_patches_alone() -> None:
    encoder = ViTEncoder("vit_tiny_patch16_224", (16, 24), 4, depth=2).eval()
    images = torch.randn(2, 3, 16, 24)
    keep = torch.tensor([[0, 5, 7, 23], [1, 2, 3, 4]])
    seen = encoder(images, keep)
    assert seen.shape == (2, 4, 192)
    # All other patches may hold anything.
    rows, columns = keep // 6, keep % 6
    changed = torch.randn(2, 3, 16, 24)
    for picture in range(2):
        for row, column in zip(rows[picture].tolist(), columns[picture].tolist(), strict=True):
            place = (picture, slice(None), slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
            changed[place] = images[place]
    torch.testing.assert_close(encoder(changed, keep), seen)
    # The same as the full pass of timm with attention to the kept patches alone.
    mask = torch.zeros(2, 24, dtype=torch.bool).scatter_(1, keep, True)
    tokens = encoder.vit.patch_embed(images) + encoder.positions
    for block in encoder.vit.blocks:
        tokens = block(tokens, attn_mask=mask[:, None, None, :])
    torch.testing.assert_close(take(encoder.vit.norm(tokens), keep), seen, rtol=1e-4, atol=1e-5)


def test_positions_tell_rows_from_columns() -> None:
    table = sincos_positions((3, 5), 16).view(3, 5, 16)
    assert (table[0, :, :8] == table[2, :, :8]).all(), "the first half depends on the column alone"
    assert (table[:, 0, 8:] == table[:, 4, 8:]).all(), "the second half on the row alone"
    angle = torch.tensor(3.0)
    assert table[0, 3, 0] == pytest.approx(angle.sin()) and table[0, 3, 4] == pytest.approx(angle.cos())
    with pytest.raises(ValueError, match="width 6"):
        sincos_positions((2, 2), 6)


def test_targets_are_normalised_features_of_the_hidden_patches() -> None:
    jepa = small_ijepa()
    observed = batch()
    pairs = jepa.target_pairs(observed)
    masks = jepa.masks.draw(3, torch.Generator().manual_seed(0))  # for the shapes
    assert pairs.predictions.shape == pairs.targets.shape
    assert pairs.targets.shape[:2] == masks.targets.shape[:2]
    normalised = F.layer_norm(jepa.encode(observed.images), (192,))
    for target in pairs.targets.flatten(0, 2):
        assert (normalised.flatten(0, 1) - target).abs().sum(1).min() < 1e-5
    assert pairs.target_features.shape == (3, 1, 192)


def test_targets_may_stay_as_they_are() -> None:
    with_norm, without = (small_ijepa(normalize_targets=value) for value in (True, False))
    for jepa in (with_norm, without):
        torch.nn.init.constant_(jepa.target_encoder.vit.norm.weight, 3.0)
    assert without.target_pairs(batch()).targets.std() == pytest.approx(3.0, rel=0.02)
    assert with_norm.target_pairs(batch()).targets.std() == pytest.approx(1.0, rel=0.02)


def test_gradients_reach_encoder_and_predictor_but_not_the_target() -> None:
    jepa = small_ijepa()
    jepa.prediction_loss(jepa.target_pairs(batch())).backward()
    for network in (jepa.context_encoder, jepa.predictor):
        without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not without
    assert all(p.grad is None for p in jepa.target_encoder.parameters())


def test_a_target_block_sees_no_other() -> None:
    jepa = small_ijepa().eval()
    context, targets = torch.tensor([[0, 1, 4]]), torch.tensor([[[10, 11], [14, 15]]])
    features = torch.randn(1, 3, 192)
    both = jepa.predictor(features, context, targets)
    torch.testing.assert_close(jepa.predictor(features, context, targets[:, 1:]), both[:, 1:])
    moved = jepa.predictor(features, context, torch.tensor([[[10, 11], [12, 13]]]))
    assert not torch.allclose(moved[:, 1], both[:, 1]), "a prediction depends on where it is"


def test_patches_have_no_curvature() -> None:
    weights = small_ijepa(regularizer="vicreg", regularizer_weights={"cov": 0.002}).regularizer.weights
    assert weights["curvature"] == 0 and weights["cov"] == 0.002 and weights["std"] == 1.0


def test_plain_attention_is_the_same_attention() -> None:
    jepa = small_ijepa().eval()
    images = torch.randn(2, 3, 16, 16)
    fused = jepa.context_encoder(images)
    attend_plainly(jepa.context_encoder)
    assert not any(block.attn.fused_attn for block in jepa.context_encoder.vit.blocks)
    torch.testing.assert_close(jepa.context_encoder(images), fused)


def test_processes_agree_on_the_sizes_of_blocks() -> None:
    """Their batches start with other samples, and yet their masks have one shape at each step, which changes by step."""
    jepa = small_ijepa(image_size=56)
    shapes = []
    for step in range(20):
        jepa._trainer = SimpleNamespace(training=True, global_step=step, estimated_stepping_batches=100)
        one, two = (jepa.draw_masks(batch(size=56)._replace(key=(0, 0, first))) for first in (3, 8))
        assert one.context.shape == two.context.shape and one.targets.shape == two.targets.shape
        assert not torch.equal(one.targets, two.targets)
        shapes.append((one.context.shape[1], one.targets.shape[2]))
    assert len(set(shapes)) > 2


def test_a_regularizer_over_processes_needs_masks_of_one_shape(pictures: Path) -> None:
    jepa = small_ijepa(regularizer="vicreg", official_compat=True)
    jepa._trainer = SimpleNamespace(world_size=2, datamodule=small_pictures(pictures))
    with pytest.raises(ValueError, match="leave one of the two out"):
        jepa.setup("fit")


def test_masks_are_a_function_of_the_batch_key() -> None:
    jepa = small_ijepa()
    one, two = batch(), batch()._replace(key=(0, 1, 0))
    assert torch.equal(jepa.target_pairs(one).targets, jepa.target_pairs(one).targets)
    first, second = jepa.target_pairs(one).targets, jepa.target_pairs(two).targets
    assert first.shape != second.shape or not torch.equal(first, second)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": (16, 32)},
        {"loss": "squared_error"},
        {"normalize_targets": False},
        {"gradient_checkpointing": True},
        {"regularizer": "vicreg"},
        {"official_compat": True, "image_size": 32},
        {"predictor_dropout": 0.1},
    ],
)
def test_options_train(changes: dict) -> None:
    jepa = small_ijepa(**changes).train()
    pairs = jepa.target_pairs(batch(size=changes.get("image_size", 16)))
    loss = jepa.prediction_loss(pairs)
    if jepa.regularizer is not None:
        loss = loss + jepa.regularizer(pairs.features)[0]
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it, nobody else
def test_compiled_networks_train_to_the_same_weights(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, and run by torch itself: a test needs no C++ compiler. Masks of several shapes among the steps."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_module(self, backend="eager", **options))
    results = []
    for compiled in (False, True):
        jepa = small_ijepa(image_size=32, compile_networks=compiled, momentum=0.9)
        trainer(tmp_path, max_epochs=2).fit(jepa, small_pictures(pictures, image_size=32))
        results.append(jepa.state_dict())
    assert results[0].keys() == results[1].keys(), "names in checkpoints stay"
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    plain, saving = small_ijepa().train(), small_ijepa(gradient_checkpointing=True).train()
    for jepa in (plain, saving):
        jepa.prediction_loss(jepa.target_pairs(batch())).backward()
    for mine, theirs in zip(plain.context_encoder.parameters(), saving.context_encoder.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_bfloat16_stays_close_to_float32() -> None:
    jepa = small_ijepa()
    exact = jepa.prediction_loss(jepa.target_pairs(batch()))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = jepa.prediction_loss(jepa.target_pairs(batch()))
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"max_epochs": 2}, 12), ({"max_epochs": 2, "accumulate_grad_batches": 4}, 4), ({"max_steps": 7}, 7)],
)
def test_ema_equals_an_average_by_hand(tmp_path: Path, pictures: Path, settings: dict, steps: int) -> None:
    jepa, shadow = small_ijepa(momentum=0.9), Shadow(steps)
    trainer(tmp_path, callbacks=[shadow], **settings).fit(jepa, small_pictures(pictures))
    shadow.check(jepa, steps)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")  # more than this machine has cores
@pytest.mark.parametrize("num_workers", [0, 2, 4])
def test_cut_and_resumed_equals_uncut(tmp_path: Path, pictures: Path, num_workers: int) -> None:
    """Crops and masks included; cut in the second epoch, after batch 3 of 6."""

    def run(**settings):
        jepa = small_ijepa(momentum=0.9)
        data = small_pictures(pictures, num_workers=num_workers, flip=0.5)
        save = ModelCheckpoint(tmp_path / "cut", filename="{step}", every_n_train_steps=9, save_top_k=-1)
        fit = {key: settings.pop(key) for key in ("ckpt_path",) if key in settings}
        run = trainer(tmp_path, enable_checkpointing=True, max_epochs=3, callbacks=[save], **settings)
        run.fit(jepa, data, **fit)
        return jepa

    whole = run()
    resumed = run(ckpt_path=tmp_path / "cut" / "step=9.ckpt")
    assert parameters_equal(whole, resumed)


SCRIPT = """
import sys
from pathlib import Path
import torch
from conftest import small_ijepa, small_pictures, trainer
from jepa_lightning.masks import Masks

out, devices, root = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
jepa = small_ijepa(momentum=0.9, regularizer="vicreg")
# One process draws masks for four pictures and each of two for two: give all of them the same.
jepa.masks.draw = lambda count, *_: Masks(torch.tensor([[0, 1, 2, 5]]).expand(count, -1),
                                          torch.tensor([[[8, 9], [10, 11]]]).expand(count, -1, -1))
run = trainer(out, devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=2, limit_val_batches=1.0)
run.fit(jepa, small_pictures(root, batch_size=4 // devices, crop_scale=(1, 1)))
# And with masks of their own, whose sizes the processes must agree on.
other = small_ijepa(regularizer="vicreg", image_size=32)
trainer(out, devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=2).fit(
    other, small_pictures(root, batch_size=4 // devices, image_size=32))
torch.save([jepa.state_dict(), {k: v for k, v in run.callback_metrics.items()}], out / f"rank{run.global_rank}.pt")
"""


def processes(out: Path, devices: int, pictures: Path) -> list[list[dict]]:
    out.mkdir()
    (out / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    environment.pop("LOCAL_RANK", None)
    arguments = [sys.executable, str(out / "script.py"), str(out), str(devices), str(pictures)]
    done = subprocess.run(arguments, env=environment, cwd=out, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(devices)]


def test_two_processes_equal_one_on_the_same_global_batch(tmp_path: Path, pictures: Path) -> None:
    ((weights, figures),) = processes(tmp_path / "one", 1, pictures)
    (first, figures0), (second, figures1) = processes(tmp_path / "two", 2, pictures)
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"ranks disagree on {name}"
        # Adam makes steps of 1e-3 out of gradients that are rounding errors: a few weights may differ by part of a step.
        torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=4e-4, msg=lambda m, n=name: f"{n}: {m}")
    for name in ("val/loss", "val/feature_std", "val/rankme", "train/regularizer_std"):
        assert figures0[name].item() == pytest.approx(figures[name].item(), rel=1e-3), name
        assert figures1[name].item() == pytest.approx(figures0[name].item(), rel=1e-6), name


def test_alarm_fires_on_a_constant_encoder_and_is_silent_otherwise(tmp_path: Path, pictures: Path) -> None:
    settings = {
        "max_epochs": 1,
        "limit_val_batches": 1.0,
        "callbacks": [CollapseAlarm(grace_steps=0, min_rankme=1.0, max_top_share=1.0)],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error", CollapseWarning)
        trainer(tmp_path, **settings).fit(small_ijepa(learning_rate=1e-5), small_pictures(pictures))
    jepa = small_ijepa(learning_rate=1e-9)
    for encoder in (jepa.context_encoder, jepa.target_encoder):
        torch.nn.init.zeros_(encoder.vit.norm.weight)
    with pytest.warns(CollapseWarning, match="all inputs look alike"):
        trainer(tmp_path, **settings).fit(jepa, small_pictures(pictures))


def test_validation_reports_what_a_person_watches(tmp_path: Path, pictures: Path) -> None:
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=1.0)
    run.fit(small_ijepa(), small_pictures(pictures))
    expected = {"train/loss", "train/momentum", "val/loss", "val/rankme", "val/error_over_mean", "val/knn_accuracy"}
    assert expected <= set(run.callback_metrics)
    assert run.callback_metrics["val/error_over_mean"] > 0.5, "an untrained predictor is hardly better than the mean"


def test_saved_and_loaded(tmp_path: Path, pictures: Path) -> None:
    run = trainer(tmp_path, max_steps=1, enable_checkpointing=True)
    jepa = small_ijepa()
    run.fit(jepa, small_pictures(pictures))
    run.save_checkpoint(tmp_path / "ijepa.ckpt")
    loaded = load_jepa(tmp_path / "ijepa.ckpt")
    assert parameters_equal(loaded.target_encoder, jepa.target_encoder)
    assert loaded.encode(batch().images).shape == (3, 16, 192)


def test_pictures_of_another_size_are_refused(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(ValueError, match=r"image_size=\(16, 16\) but data.image_size=\(32, 32\)"):
        trainer(tmp_path, max_steps=1).fit(small_ijepa(), small_pictures(pictures, image_size=32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "resnet50"}, "'resnet50' is no vision transformer"),
        ({"image_size": 18}, "is not a multiple of patch_size=4"),
        ({"predictor_width": 25}, "predictor_width=25"),
        ({"loss": "hinge"}, "model.loss='hinge'"),
        ({"target_scale": (0.0, 0.2)}, "target_scale="),
        ({"regularizer_weights": {"std": 1.0}}, "without a model.regularizer"),
    ],
)
def test_impossible_models_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_ijepa(**changes)
