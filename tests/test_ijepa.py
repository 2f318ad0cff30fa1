"""I-JEPA: what predicts what, and the guarantees of every JEPA: EMA, resume, processes, alarm, clear errors."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import small_ijepa, small_images, trainer
from torch.nn import functional as F

from datamodules import ImageBatch
from jepa_lightning.networks.vit import ViTEncoder, sincos_positions, take


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
    for image in range(2):
        for row, column in zip(rows[image].tolist(), columns[image].tolist(), strict=True):
            place = (image, slice(None), slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
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


def test_targets_are_normalized_features_of_the_hidden_patches() -> None:
    jepa = small_ijepa()
    observed = batch()
    pairs = jepa.target_pairs(observed)
    masks = jepa.masks.draw(3, torch.Generator().manual_seed(0))  # for the shapes
    assert pairs.predictions.shape == pairs.targets.shape
    assert pairs.targets.shape[:2] == masks.targets.shape[:2]
    normalized = F.layer_norm(jepa.encode(observed.images), (192,))
    for target in pairs.targets.flatten(0, 2):
        assert (normalized.flatten(0, 1) - target).abs().sum(1).min() < 1e-5
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
    weights = small_ijepa(regularizer="vicreg", regularizer_weights={"covariance": 0.002}).regularizer.weights
    assert weights["curvature"] == 0 and weights["covariance"] == 0.002 and weights["variance"] == 1.0


def test_attention_is_chosen_by_the_device_where_it_computes() -> None:
    jepa = small_ijepa().eval()
    attention, images = jepa.context_encoder.vit.blocks[0].attn, torch.randn(2, 3, 16, 16)
    jepa.context_encoder(images)
    assert not attention.fused_attn
    jepa.context_encoder.to("meta")(images.to("meta"))
    assert attention.fused_attn, "what was chosen on a CPU stuck"


def test_plain_attention_is_the_same_attention() -> None:
    block = small_ijepa().context_encoder.vit.blocks[0].eval()
    tokens = torch.randn(2, 5, 192)
    plain = block(tokens)
    block.attn._forward_pre_hooks.clear()
    block.attn.fused_attn = True
    torch.testing.assert_close(block(tokens), plain)


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


def test_the_curriculum_follows_the_optimizer_steps_and_validation_has_its_end() -> None:
    jepa = small_ijepa(image_size=56, target_scale=(0.05, 0.05), final_target_scale=(0.3, 0.3))
    areas = []
    for training, step in ((True, 0), (True, 50), (True, 99), (False, 0)):
        jepa._trainer = SimpleNamespace(training=training, global_step=step, estimated_stepping_batches=100)
        areas.append(jepa.draw_masks(batch(size=56)).targets.shape[2] / 14**2)
    assert areas == pytest.approx([0.05, 0.175, 0.3, 0.3], abs=0.03)


def test_a_regularizer_over_processes_needs_masks_of_one_shape(image_root: Path) -> None:
    jepa = small_ijepa(regularizer="vicreg", official_compat=True)
    jepa._trainer = SimpleNamespace(world_size=2, datamodule=small_images(image_root))
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


def test_validation_reports_what_a_person_watches(tmp_path: Path, image_root: Path) -> None:
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=1.0)
    run.fit(small_ijepa(), small_images(image_root))
    expected = {"train/loss", "train/momentum", "val/loss", "val/rankme", "val/normalized_error", "val/knn_accuracy"}
    assert expected <= set(run.callback_metrics)
    assert run.callback_metrics["val/normalized_error"] > 0.5, "an untrained predictor is hardly better than the mean"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "resnet50"}, "'resnet50' is no vision transformer"),
        ({"image_size": 18}, "is not a multiple of patch_size=4"),
        ({"predictor_width": 25}, "predictor_width=25"),
        ({"loss": "hinge"}, "model.loss='hinge'"),
        ({"target_scale": (0.0, 0.2)}, "target_scale="),
        ({"regularizer_weights": {"variance": 1.0}}, "without a model.regularizer"),
    ],
)
def test_impossible_models_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_ijepa(**changes)


def test_contexts_of_an_image_share_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    jepa, observed = small_ijepa(), batch(3)
    masks = jepa.masks.draw(6, torch.Generator().manual_seed(0))
    calls: list[int] = []
    jepa.target_encoder.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    monkeypatch.setattr(jepa, "draw_masks", lambda batch: masks)
    pairs = jepa.target_pairs(observed)
    assert calls == [3], "the target encoder sees each image once"
    assert pairs.target_features.shape == (3, 1, 192) and pairs.features.shape[:2] == masks.context.shape
    for place in range(6):
        image = place % 3
        alone = type(masks)(masks.context[place : place + 1], masks.targets[place : place + 1])
        monkeypatch.setattr(jepa, "draw_masks", lambda batch, alone=alone: alone)
        one = jepa.target_pairs(observed._replace(images=observed.images[image : image + 1], labels=observed.labels[:1]))
        for name in ("predictions", "targets", "features"):
            ours, theirs = getattr(pairs, name)[place], getattr(one, name)[0]
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_several_contexts_are_drawn_in_training_alone(tmp_path: Path, image_root: Path) -> None:
    jepa, counts = small_ijepa(num_contexts=3), {True: set(), False: set()}
    jepa.context_encoder.register_forward_hook(lambda module, inputs, output: counts[jepa.training].add(len(output)))
    run, data = trainer(tmp_path, max_steps=2, limit_val_batches=1), small_images(image_root, batch_size=4)
    run.fit(jepa, data)
    run.validate(jepa, data, verbose=False)
    assert counts == {True: {12}, False: {4}}
    with pytest.raises(ValueError, match="model.num_contexts=0: an image needs at least 1"):
        small_ijepa(num_contexts=0)
