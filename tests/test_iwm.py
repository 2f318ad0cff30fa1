"""IWM: what the predictor is conditioned on, what is ranked, and what its predictor is good for afterwards."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    parameters_equal,
    run_script,
    small_ijepa,
    small_images,
    small_iwm,
    small_views,
    trainer,
)
from matplotlib.figure import Figure

import jepa_lightning.action_monitor
import jepa_lightning.mean_reciprocal_rank
from datamodules import ViewBatch, Views
from datamodules.preprocessing import denormalize
from jepa_lightning import IWM
from jepa_lightning.mean_reciprocal_rank import ActionProbe, MeanReciprocalRanks, bank_generator, chance, nearest_figure
from jepa_lightning.networks.masked_predictor import AdaptiveBlock
from jepa_lightning.networks.vit import take
from jepa_lightning.probes import CompletionProbe, EquivarianceProbe, FineTuning, PredictorFineTuning

VIEWS = Views()


def batch(count: int = 3, size: int = 16) -> ViewBatch:
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(count, 3, size, size, generator=generator) for _ in range(3)]
    actions = torch.randn(count, 7, generator=generator)
    return ViewBatch(views[0], views[1], actions, views[2], torch.zeros(count, dtype=torch.int64), (0, 0, 0))


def test_all_that_is_hidden_is_predicted_at_once_in_the_target_view() -> None:
    jepa, observed = small_iwm().eval(), batch()
    masks = jepa.draw_masks(observed)
    assert masks.targets.shape == (3, 1, 16 - masks.context.shape[1])
    for seen, hidden in zip(masks.context, masks.targets[:, 0], strict=True):
        assert sorted([*seen.tolist(), *hidden.tolist()]) == list(range(16))
    pairs = jepa.target_pairs(observed)
    target = torch.nn.functional.layer_norm(jepa.encode(observed.targets), (192,))
    expected = torch.stack([rows[hidden] for rows, hidden in zip(target, masks.targets[:, 0], strict=True)])
    torch.testing.assert_close(pairs.targets[:, 0], expected)
    # What is hidden of the source, and all of the target, may change without changing the prediction.
    rows, columns = masks.targets[:, 0] // 4, masks.targets[:, 0] % 4
    changed = observed.sources.clone()
    for image in range(3):
        for row, column in zip(rows[image].tolist(), columns[image].tolist(), strict=True):
            changed[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 9.0
    other = observed._replace(sources=changed, targets=torch.zeros_like(observed.targets))
    torch.testing.assert_close(jepa.target_pairs(other).predictions, pairs.predictions)


def in_training(jepa: IWM, step: int = 0) -> IWM:
    """A model that believes to be in a training of 400 steps, in whatever mode its layers are."""
    jepa._trainer = SimpleNamespace(training=True, global_step=step, estimated_stepping_batches=400)
    return jepa


def test_visible_patches_are_predicted_too_in_training_if_asked_for() -> None:
    jepa, observed = small_iwm(predict_visible=True), batch()
    hidden, apart = jepa.draw_masks(observed), jepa.target_pairs(observed).predictions
    assert hidden.targets.shape == (3, 1, 16 - hidden.context.shape[1]), "held-out images: as without"
    jepa.masks.draw = lambda *_: hidden  # sizes are drawn by step in training, and by the batch elsewhere
    masks = in_training(jepa).draw_masks(observed)
    visible = masks.context.shape[1]
    assert masks.context.tolist() == hidden.context.tolist(), "the context encoder sees what it saw before"
    assert masks.targets[:, 0, :visible].tolist() == masks.context.tolist()
    assert masks.targets[:, 0, visible:].tolist() == hidden.targets[:, 0].tolist()
    pairs = jepa.target_pairs(observed)
    whole = torch.nn.functional.layer_norm(jepa.encode(observed.targets), (192,))
    torch.testing.assert_close(pairs.targets[:, 0], take(whole, masks.targets[:, 0]))
    # The hidden ones are predicted from all that is visible, as they are where they alone are asked for.
    torch.testing.assert_close(pairs.predictions[:, :, visible:], apart)


@pytest.mark.parametrize("conditioning", ["feature", "sequence", "adaptive_norm", "none"])
def test_a_visible_patch_is_predicted_at_its_own_token(conditioning: str) -> None:
    predictor = small_iwm(predict_visible=True, conditioning=conditioning).predictor
    features, action = torch.randn(1, 3, 192), torch.randn(1, 7)
    context, hidden = torch.tensor([[5, 2, 9]]), torch.tensor([[[0, 1, 15]]])
    read = []
    predictor.blocks[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    for block in predictor.blocks:  # without attention each token is on its own
        torch.nn.init.zeros_(block.attn.proj.weight)
    predicted = predictor(features, context, hidden, action, with_context=True)
    assert predicted.shape == (1, 1, 6, 192)
    scalars = 7 if conditioning == "sequence" else 0
    assert read[0].shape[1] == scalars + 6, "there are no mask tokens where something is seen"
    changed = features.clone()
    changed[:, 1] += torch.randn(192)
    moved = (predictor(changed, context, hidden, action, with_context=True) - predicted)[0, 0]
    assert moved[1].abs().max() > 1e-3 and moved[[0, 2, 3, 4, 5]].abs().max() < 1e-6
    alone = predictor(changed, context, hidden, action)
    torch.testing.assert_close(alone, predicted[:, :, 3:])
    everything = torch.randn(2, 16, 192)
    at_own_tokens = predictor.predict_all(everything, action.expand(2, -1))
    assert at_own_tokens.shape == (2, 16, 192) and read[-1].shape[1] == scalars + 16
    order = torch.randperm(16)
    shuffled = predictor(everything[:, order], order.expand(2, -1), hidden[:, :, :0].expand(2, -1, -1),
                         action.expand(2, -1), with_context=True)  # fmt: skip
    torch.testing.assert_close(shuffled[:, 0], at_own_tokens[:, order])


@pytest.mark.parametrize("predict_visible", [False, True])
def test_nothing_is_hidden_in_a_fraction_of_the_training_steps(predict_visible: bool) -> None:
    jepa, observed = small_iwm(whole_fraction=0.25, predict_visible=predict_visible), batch()
    assert jepa.draw_masks(observed).context.shape[1] < 16, "held-out images: as without"
    whole = []
    for step in range(400):
        masks = in_training(jepa, step).draw_masks(observed)
        whole.append(masks.context.shape[1] == 16)
        assert masks.targets.shape[2] == (16 if whole[-1] or predict_visible else 16 - masks.context.shape[1])
        elsewhere = jepa.draw_masks(observed._replace(key=(0, 1, 7)))  # another process
        assert (elsewhere.context.shape[1] == 16) == whole[-1]
    assert 0.18 < sum(whole) / 400 < 0.32
    pairs, masks = in_training(jepa, whole.index(True)).target_pairs(observed), jepa.draw_masks(observed)
    assert masks.context.tolist() == [list(range(16))] * 3 and masks.targets.tolist() == [[list(range(16))]] * 3
    torch.testing.assert_close(
        pairs.predictions[:, 0], jepa.apply_actions(jepa.context_encoder(observed.sources), observed.actions)
    )
    torch.testing.assert_close(pairs.targets[:, 0], jepa.encode_targets(observed.targets))


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_a_fraction_of_whole_steps_that_is_none_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"model\.whole_fraction={fraction}: choose a fraction of the steps in \[0, 1\]"):
        small_iwm(whole_fraction=fraction)


def listening(jepa: IWM) -> IWM:
    """A model whose adaptive norms have learned something: they start by changing nothing."""
    torch.manual_seed(0)
    for name, parameter in jepa.predictor.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return jepa


@pytest.mark.parametrize("predict_visible", [False, True])
@pytest.mark.parametrize("conditioning", ["feature", "sequence", "adaptive_norm", "none"])
def test_the_predictor_is_action_conditioned(conditioning: str, predict_visible: bool) -> None:
    jepa, observed = in_training(listening(small_iwm(conditioning=conditioning, predict_visible=predict_visible))), batch()
    predictions, seen = jepa.target_pairs(observed).predictions, jepa.context_encoder(observed.images)
    for scalar in range(7):
        actions = observed.actions.clone()
        actions[:, scalar] += 1.0
        others = jepa.target_pairs(observed._replace(actions=actions)).predictions
        changed = not torch.allclose(others, predictions, atol=1e-7)
        assert changed == (conditioning != "none"), f"scalar {scalar}"
        applied = [jepa.apply_actions(seen, given) for given in (actions, observed.actions)]
        assert torch.allclose(*applied, atol=1e-7) == (conditioning == "none"), f"scalar {scalar}, all seen"
    jepa.prediction_loss(jepa.target_pairs(observed)).backward()
    for network in (jepa.context_encoder, jepa.predictor):
        without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not without
    zero = jepa.apply_actions(jepa.context_encoder(observed.images), torch.zeros(3, 7))
    assert torch.equal(jepa.apply_actions(jepa.context_encoder(observed.images)), zero), "no action is the zero action"
    assert zero.shape == (3, 16, 192)


@pytest.mark.parametrize("predict_visible", [False, True])
def test_an_action_is_joined_to_mask_tokens_and_to_visible_ones_if_they_are_predicted(predict_visible: bool) -> None:
    predictor = small_iwm(predict_visible=predict_visible).predictor
    given = []
    predictor.blocks[0].register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    features, context, hidden = torch.randn(1, 3, 192), torch.tensor([[5, 2, 9]]), torch.tensor([[[0, 1]]])
    for action in (torch.zeros(1, 7), torch.ones(1, 7)):
        predictor(features, context, hidden, action)
    joined = (given[0] != given[1]).any(dim=2)[0].tolist()
    assert joined == [predict_visible] * 3 + [True] * 2


def test_the_scalars_of_a_sequence_are_not_mistaken_for_each_other() -> None:
    jepa = small_iwm(conditioning="sequence").eval()
    features = jepa.context_encoder(batch().images)
    one, other = (jepa.apply_actions(features, torch.eye(7)[number].expand(3, -1)) for number in (0, 1))
    assert not torch.allclose(one, other, atol=1e-7)


def test_adaptive_norms_start_as_those_of_a_transformer_without_actions() -> None:
    jepa, plain, observed = small_iwm(conditioning="adaptive_norm"), small_iwm(conditioning="none"), batch()
    found = plain.load_state_dict(jepa.state_dict(), strict=False)
    assert not found.missing_keys and all("modulation" in name or "condition" in name for name in found.unexpected_keys)
    for change in (False, True):
        same = torch.allclose(*(model.eval().target_pairs(observed).predictions for model in (jepa, plain)), atol=1e-6)
        assert same != change
        listening(jepa)


def test_each_block_of_patches_hears_the_action_of_its_image() -> None:
    predictor = listening(small_iwm(conditioning="adaptive_norm")).predictor
    features, actions = torch.randn(2, 5, 192), torch.randn(2, 7)
    context, targets = torch.arange(5).expand(2, -1), torch.tensor([[5, 6], [9, 8]]).expand(2, -1, -1)
    together = predictor(features, context, targets, actions)
    for image in range(2):
        for number in range(2):
            one = slice(image, image + 1)
            alone = predictor(features[one], context[one], targets[one, number, None], actions[one])
            torch.testing.assert_close(together[image, number], alone[0, 0])


def test_a_condition_scales_and_shifts_norms_and_scales_branches() -> None:
    torch.manual_seed(0)
    block, tokens = AdaptiveBlock(8, 2).eval(), torch.randn(2, 3, 8)

    def output(**changes: float) -> torch.Tensor:
        names = ("scale", "shift", "gain", "mlp_scale", "mlp_shift", "mlp_gain")
        torch.nn.init.zeros_(block.modulation.weight)
        block.modulation.bias.data = torch.tensor([changes.get(name, 0.0) for name in names]).repeat_interleave(8)
        return block(tokens, None, torch.zeros(2, 1, 8)).detach()

    normed, later = block.norm1(tokens), block.norm2(tokens)
    seen = tokens + block.attn(normed)
    torch.testing.assert_close(output(), seen + block.mlp(block.norm2(seen)))
    torch.testing.assert_close(output(gain=-1, mlp_gain=-1), tokens)
    torch.testing.assert_close(output(gain=1, mlp_gain=-1), tokens + 2 * block.attn(normed))
    torch.testing.assert_close(output(scale=2, shift=0.5, mlp_gain=-1), tokens + block.attn(3 * normed + 0.5))
    torch.testing.assert_close(output(gain=-1, mlp_scale=2, mlp_shift=0.5), tokens + block.mlp(3 * later + 0.5))


def tiles(figure: Figure) -> tuple[int, int]:
    """Rows and columns of a figure of images of 16 pixels with a gap of one between them."""
    height, width = figure.axes[0].images[0].get_size()
    return (height + 1) // 17, (width + 1) // 17


def test_validation_draws_what_a_person_watches(tmp_path: Path, image_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jepa_lightning.action_monitor, "WATCHED", 1)
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=1.0)
    run.fit(small_iwm(), small_views(image_root))
    figures = run.callback_metrics
    assert {"val/mrr", "val/mrr_pooled", "val/action_r2_hue", "val/knn_accuracy", "val/normalized_error"} <= set(figures)
    assert abs(figures["val/mrr_shuffled_actions"].item() - chance()) < 0.02
    figure = nearest_figure(small_iwm().eval(), batch(2).images, VIEWS, (0, 1))
    assert tiles(figure) == (4, 9)


def test_validation_ranks_the_first_images_and_reads_actions_from_all(
    tmp_path: Path, image_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jepa_lightning.action_monitor, "WATCHED", 3)
    monkeypatch.setattr(jepa_lightning.mean_reciprocal_rank, "BANK_SIZE", 16)
    jepa, data = small_iwm(), small_views(image_root, val_fraction=0.5, normalization="found")
    run = trainer(tmp_path, limit_val_batches=1.0)
    run.validate(jepa, data, verbose=False)
    ranks, probe = MeanReciprocalRanks(), ActionProbe(192, 7)
    jepa.eval()
    for number, plain in enumerate(data.val_dataloader()):
        pairs = data.on_after_batch_transfer(plain, 0)
        if number == 0:
            assert len(pairs.images) > 3
            for place, image in enumerate(denormalize(pairs.images[:3], jepa.pixels)):
                ranks.update(jepa, image, data.views, bank_generator(pairs, place, 1))
        with torch.no_grad():
            source, target = (jepa.target_encoder(views).mean(dim=1) for views in (pairs.sources, pairs.targets))
        probe.update(source, target, pairs.actions)
    assert number > 0
    expected = ranks.compute().mean
    found = {name: value.item() for name, value in run.callback_metrics.items()}
    for name, value in (
        ("mrr", expected["patch"]["overall"]),
        ("mrr_pooled", expected["pooled"]["overall"]),
        ("mrr_shuffled_actions", expected["patch"]["shuffled_actions"]),
    ):
        assert found[f"val/{name}"] == pytest.approx(value, rel=1e-4), name
    for name, value in zip(data.views.action_names, probe.compute(), strict=True):
        assert found[f"val/action_r2_{name}"] == pytest.approx(value.item(), rel=1e-2), name


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, image_root: Path) -> Path:
    root = tmp_path_factory.mktemp("iwm")
    run = trainer(root, max_steps=2, enable_checkpointing=True)
    run.fit(small_iwm(), small_views(image_root))
    run.save_checkpoint(root / "iwm.ckpt")
    return root / "iwm.ckpt"


def test_the_report_has_figures_and_baselines(tmp_path: Path, image_root: Path, checkpoint: Path) -> None:
    trainer(tmp_path).test(EquivarianceProbe(str(checkpoint), num_images=2), small_views(image_root), verbose=False)
    report = json.loads((tmp_path / "report.json").read_text())
    mrr = report["mrr"]
    assert mrr["num_images"] == 2 and mrr["chance"] == pytest.approx(chance())
    assert list(mrr["per_transformation"]) == [
        "brightness",
        "contrast",
        "saturation",
        "hue",
        "grayscale",
        "blur",
        "solarize",
    ]
    assert mrr["action_blind"] == pytest.approx(chance(), rel=0.05), "the same answer to all questions"
    assert 0 < mrr["overall"] < 1 and 0 < mrr["standard_error"] < 0.1
    assert set(mrr["untold"]) == {"grayscale", "blur", "solarize"}
    assert set(report["action_r2"]) == {"encoder", "untrained", "other_pairs"}
    assert set(report["feature_change"]) == {"encoder", "untrained"}
    assert report["views"]["strength"] == report["trained_on_views"]["strength"] == "default"
    assert 0 < report["feature_change"]["untrained"] < 2
    assert (tmp_path / "nearest_versions.png").stat().st_size > 1000
    assert "all four colors" in (tmp_path / "report.md").read_text()


def test_each_image_is_conditioned_on_its_own_action() -> None:
    jepa, observed = small_iwm().eval(), batch()
    predictions = jepa.target_pairs(observed).predictions
    actions = observed.actions.clone()
    actions[1] += 1.0
    changed = jepa.target_pairs(observed._replace(actions=actions)).predictions
    assert [torch.equal(changed[image], predictions[image]) for image in range(3)] == [True, False, True]
    with pytest.raises(ValueError, match="Actions of 3 scalars for a model of 7"):
        jepa.apply_actions(jepa.context_encoder(observed.images), torch.zeros(3, 3))


def test_a_decoder_draws_what_is_predicted(tmp_path: Path, image_root: Path, checkpoint: Path) -> None:
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=1.0)
    probe = CompletionProbe(str(checkpoint), width=64, depth=1)
    run.fit(probe, small_images(image_root))
    for name in ("completion.png", "action_sweep.png"):
        assert (tmp_path / name).stat().st_size > 1000
    assert tiles(probe._action_sweep(batch(1).images)) == (8, 9)
    images = batch(2).images
    found = probe.complete(images, torch.Generator().manual_seed(0))
    masks = probe.masks.draw(2, torch.Generator().manual_seed(0), 1.0)
    hidden = masks.hidden(16)
    predicted = probe.predictor(probe.context_encoder(images, masks.context), masks.context, hidden[:, None])[:, 0]
    features = torch.zeros(2, 16, 192)
    context = torch.nn.functional.layer_norm(probe.context_encoder(images, masks.context), (192,))
    for row in range(2):
        features[row, masks.context[row]], features[row, hidden[row]] = context[row], predicted[row]
    torch.testing.assert_close(found.completed, probe.decoders["jepa"](features))


def test_other_probes_read_an_iwm_too(checkpoint: Path) -> None:
    probe = FineTuning(str(checkpoint), 2)
    assert parameters_equal(probe.encoder, IWM.load_from_checkpoint(checkpoint, weights_only=True).target_encoder)


def test_clear_errors(tmp_path: Path, image_root: Path, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"set data to ImageFolder or SyntheticImages with data.views.strength=default"):
        trainer(tmp_path, max_steps=1).fit(small_iwm(), small_images(image_root))
    with pytest.raises(
        ValueError, match=r"model.action_dim=7 but the data's actions have 12 scalars .*mirrored.*set it to 12"
    ):
        trainer(tmp_path, max_steps=1).fit(small_iwm(), small_views(image_root, views=Views(geometric=True)))
    places = {f"{kind}_probability": 0.0 for kind in ("jitter", "grayscale", "blur", "solarize")}
    with pytest.raises(ValueError, match=r"An IWM is of color images, and data.channels=1: train an IJEPA"):
        gray = small_views(image_root, channels=1, views=Views(geometric=True, **places))
        trainer(tmp_path, max_steps=1).fit(small_iwm(), gray)
    with pytest.raises(ValueError, match=r"model.action_dim=3"):
        small_iwm(action_dim=3)
    with pytest.raises(ValueError, match=r"conditioning='film'"):
        small_iwm(conditioning="film")
    with pytest.raises(ValueError, match=r"model.pretrained_factor=0"):
        PredictorFineTuning(str(checkpoint), 2, pretrained_factor=0)
    with pytest.raises(ValueError, match=r"model.num_images=1"):
        EquivarianceProbe(str(checkpoint), num_images=1)
    run = trainer(tmp_path, max_steps=1, enable_checkpointing=True)
    run.fit(small_ijepa(), small_images(image_root))
    run.save_checkpoint(tmp_path / "ijepa.ckpt")
    for probe in (EquivarianceProbe, PredictorFineTuning):
        with pytest.raises(ValueError, match=r"holds a IJEPA"):
            probe(str(tmp_path / "ijepa.ckpt"))


def test_views_are_for_those_that_learn_from_pairs(tmp_path: Path, image_root: Path, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"model.view_weight=0 learns from one view .* give --data.views null"):
        trainer(tmp_path, max_steps=1).fit(small_ijepa(), small_views(image_root))
    for probe in (FineTuning(str(checkpoint), 2), PredictorFineTuning(str(checkpoint), 2), CompletionProbe(str(checkpoint))):
        with pytest.raises(
            ValueError,
            match=r"cannot read what ImageFolder hands out .ViewBatch.: set data to ImageFolder or SyntheticImages",
        ):
            trainer(tmp_path, max_steps=1).fit(probe, small_views(image_root))


RANKS = """
import sys
from pathlib import Path
from test_iwm import rank_on

rank_on(2, Path(sys.argv[1]), *sys.argv[2:])
"""


def rank_on(devices: int, out: Path, root: str, checkpoint: str) -> None:
    run = trainer(out, devices=devices, strategy="ddp" if devices > 1 else "auto")
    run.test(EquivarianceProbe(checkpoint, num_images=3), small_views(root, batch_size=4 // devices), verbose=False)


def test_two_processes_rank_what_one_ranks(tmp_path: Path, image_root: Path, checkpoint: Path) -> None:
    run_script(RANKS, tmp_path / "2", str(image_root), str(checkpoint))
    rank_on(1, tmp_path / "1", str(image_root), str(checkpoint))
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("1", "2")]
    one, two = reports
    assert one["mrr"]["num_images"] == two["mrr"]["num_images"] == 3
    for kind in ("mrr", "mrr_pooled"):
        assert two[kind]["overall"] == pytest.approx(one[kind]["overall"], rel=1e-3)
        assert two[kind]["per_transformation"] == pytest.approx(one[kind]["per_transformation"], rel=1e-3)


def test_geometric_actions_train(tmp_path: Path, image_root: Path) -> None:
    jepa = small_iwm(action_dim=12)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(jepa, small_views(image_root, views=Views(geometric=True)))
    assert run.global_step == 6 and torch.isfinite(run.callback_metrics["train/loss"])
