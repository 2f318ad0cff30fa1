"""I-JEPA with a second prediction: of another view's pooled embedding, from the context's."""

import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from conftest import small_crops, small_ijepa, small_images, trainer
from PIL import Image
from torch.nn import functional

from datamodules import ImageBatch, ViewBatch, Views
from jepa_lightning import IJEPA
from jepa_lightning.weights.loading import start_from


def pairs_of_views(count: int = 3, training: bool = True) -> ViewBatch:
    sources, targets, images = torch.randn(3, count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(count, dtype=torch.int64)
    return ViewBatch(sources, targets, torch.zeros(count, 7), None if training else images, labels, (0, 0, 0))


def test_the_loss_is_that_of_the_other_views_normalized_average() -> None:
    jepa, batch = small_ijepa(view_weight=1.0), pairs_of_views()
    context = torch.randn(6, 5, 192)  # two contexts of each image, those of all images one after the other
    loss = jepa.view_loss(batch, context)
    other = jepa.target_encoder(batch.targets).mean(1)
    other = (other - other.mean(1, keepdim=True)) / other.var(1, unbiased=False, keepdim=True).add(1e-5).sqrt()
    mean = context.mean(1)
    mean = (mean - mean.mean(1, keepdim=True)) / mean.var(1, unbiased=False, keepdim=True).add(1e-5).sqrt()
    errors = [functional.smooth_l1_loss(jepa.view_predictor(mean[row]), other[row % 3]) for row in range(6)]
    torch.testing.assert_close(loss, torch.stack(errors).mean())


def test_gradients_reach_encoder_and_its_predictor_but_not_the_target() -> None:
    jepa = small_ijepa(view_weight=1.0)
    batch = pairs_of_views()
    jepa.view_loss(batch, jepa.context_encoder(batch.sources)).backward()
    for network in (jepa.context_encoder, jepa.view_predictor):
        assert not [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert all(p.grad is None for p in (*jepa.target_encoder.parameters(), *jepa.predictor.parameters()))


def test_patches_are_predicted_of_one_view_in_training_and_of_the_image_elsewhere() -> None:
    jepa = small_ijepa(view_weight=1.0)
    training, held_out = pairs_of_views(), pairs_of_views(training=False)
    recolored = training._replace(recolored=torch.zeros(3, 3, 16, 16))
    for batch, seen, whole in (
        (training, training.sources, training.sources),
        (recolored, training.sources, recolored.recolored),
        (held_out, held_out.images, held_out.images),
    ):
        views = jepa.views(batch)
        assert views[0] is seen and views[1] is whole


def test_the_weight_rises_and_scales_what_is_added_to_the_loss(tmp_path: Path, image_root: Path) -> None:
    model, weights = small_ijepa(view_weight=3.0, view_start_fraction=0.25), []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *rest: object) -> None:
            metrics = trainer.callback_metrics
            added = metrics["train/loss"] - metrics["train/prediction_loss"]
            weights.append((added / metrics["train/view_loss"]).item() if "train/view_loss" in metrics else added.item())

    trainer(tmp_path, max_epochs=4, log_every_n_steps=1, callbacks=[Watch()]).fit(
        model, small_crops(image_root, batch_size=2)
    )
    assert len(weights) == 48
    rising = [3 * (step / 48 - 0.25) / 0.1 for step in range(12, 17)]
    assert weights == pytest.approx([0.0] * 12 + rising + [3.0] * 31, abs=2e-4)


def test_its_predictor_is_trained_and_kept(tmp_path: Path, image_root: Path) -> None:
    model = small_ijepa(view_weight=1.0)
    before = [p.clone() for p in model.view_predictor.parameters()]
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=1)
    run.fit(model, small_crops(image_root))
    assert all((p != old).any() for p, old in zip(model.view_predictor.parameters(), before, strict=True))
    assert "val/normalized_error" in run.callback_metrics
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = IJEPA.load_from_checkpoint(tmp_path / "model.ckpt")
    for mine, theirs in zip(model.view_predictor.parameters(), loaded.view_predictor.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_before_its_start_nothing_is_done_for_it(tmp_path: Path, image_root: Path) -> None:
    """Neither the pass of the other view, nor steps of its predictor: of zero gradients, or of weight decay."""
    model = small_ijepa(view_weight=1.0, view_start_fraction=0.5, weight_decay=0.5, final_weight_decay=None)
    before, passes, changed = [p.clone() for p in model.view_predictor.parameters()], [], []
    model.target_encoder.register_forward_hook(lambda *_: passes.append(1))

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_: object) -> None:
            parameters = model.view_predictor.parameters()
            changed.append(any((p != old).any().item() for p, old in zip(parameters, before, strict=True)))

        def on_train_end(self, trainer: pl.Trainer, *_: object) -> None:
            self.steps = {trainer.optimizers[0].state[p]["step"].item() for p in model.view_predictor.parameters()}

    watch = Watch()
    trainer(tmp_path, max_epochs=1, callbacks=[watch]).fit(model, small_crops(image_root, batch_size=4))
    assert changed == [False] * 4 + [True] * 2 and len(passes) == 6 + 2, "at step 3 of 6 its weight is 0 still"
    assert watch.steps == {2}


def test_images_as_they_are_are_enough_to_validate(tmp_path: Path, image_root: Path) -> None:
    for data in (small_images(image_root), small_crops(image_root)):
        run = trainer(tmp_path, limit_val_batches=1)
        figures = run.validate(small_ijepa(view_weight=1.0), data, verbose=False)
        assert figures[0]["val/loss"] > 0


def test_weights_to_start_from_have_its_predictor(tmp_path: Path, image_root: Path) -> None:
    first, second = small_ijepa(view_weight=1.0), small_ijepa(view_weight=1.0)
    torch.nn.init.normal_(first.view_predictor[0].weight)
    run = trainer(tmp_path, max_steps=1)
    run.fit(first, small_crops(image_root))
    run.save_checkpoint(tmp_path / "first.ckpt")
    start_from(second, tmp_path / "first.ckpt")
    assert torch.equal(second.view_predictor[0].weight, first.view_predictor[0].weight)


def test_views_may_differ_by_color_alone(tmp_path: Path, image_root: Path) -> None:
    model, run = small_ijepa(view_weight=1.0), trainer(tmp_path, max_steps=1)
    run.fit(model, small_images(image_root, views=Views()))
    assert run.global_step == 1


def test_without_a_weight_nothing_is_there() -> None:
    plain = small_ijepa()
    assert plain.view_predictor is None and not [name for name in plain.state_dict() if name.startswith("view_predictor")]
    torch.testing.assert_close(
        plain.context_encoder(torch.ones(1, 3, 16, 16)),
        small_ijepa(view_weight=1.0).context_encoder(torch.ones(1, 3, 16, 16)),
    )


def test_what_does_not_fit_is_refused(tmp_path: Path, image_root: Path) -> None:
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"model\.view_weight=.*: choose a weight from 0"):
            small_ijepa(view_weight=weight)
    with pytest.raises(ValueError, match=r"model\.view_start_fraction=0\.95: choose one in \[0, 0\.9\]"):
        small_ijepa(view_weight=1.0, view_start_fraction=0.95)
    still = {f"{kind}_probability": 0.0 for kind in ("jitter", "grayscale", "blur", "solarize")}
    for weight, views, message in (
        (1.0, None, "this data has none: give --data.views.geometric true, or --model.view_weight 0."),
        (1.0, Views(**still), "both views are the same. Give --data.views.geometric true."),
        (0.0, Views(), "give --data.views null, or --model.view_weight 1."),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            trainer(tmp_path, max_steps=1).fit(small_ijepa(view_weight=weight), small_images(image_root, views=views))
    with pytest.raises(ValueError, match="a ViewBatch, and this is a ImageBatch: set view_weight=0"):
        labels = torch.zeros(3, dtype=torch.int64)
        small_ijepa(view_weight=1.0).view_loss(ImageBatch(torch.zeros(3, 3, 16, 16), labels, (0,)), torch.zeros(3, 5, 192))


@pytest.mark.parametrize("channels", [1, 5])
def test_views_of_other_channels_keep_their_colors(tmp_path: Path, channels: int) -> None:
    """Places alone make views of any number of channels; changes of color are refused, with flags that leave them out."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(12):
        values = [20 * page + number for page in range(channels)]
        pages = [Image.fromarray(torch.full((20, 20), value, dtype=torch.uint8).numpy()) for value in values]
        pages[0].save(folder / f"{number}.tif", save_all=True, append_images=pages[1:])
    given = {"geometric": True, "blur_probability": 0.0, "solarize_probability": 0.0}
    with pytest.raises(ValueError) as error:
        small_images(folder, channels=channels, views=Views(**given))
    flags = "--data.views.geometric true --data.views.jitter_probability 0 --data.views.grayscale_probability 0."
    assert str(error.value).endswith(flags), "those that are not 0 yet, to copy"
    places = Views(**given, jitter_probability=0.0, grayscale_probability=0.0)
    data = small_images(folder, channels=channels, views=places, batch_size=4)
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=1)
    run.fit(small_ijepa(view_weight=1.0, channels=channels), data)
    batch = next(iter(data.train_dataloader()))
    assert batch.sources.shape == batch.targets.shape == (4, channels, 16, 16)
    for views in (batch.sources, batch.targets):
        colors = views.flatten(2).unique(dim=2).squeeze(2)  # of each image one in each channel, as in its file
        assert (colors.diff(dim=1) == 20).all() and set(colors[:, 0].tolist()) <= set(range(12))


class SaveAt(pl.Callback):
    """Saves a checkpoint after so many steps."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_a_run_cut_before_its_start_goes_on_bit_for_bit(tmp_path: Path, image_root: Path) -> None:
    """AdamW has no state of its predictor yet."""
    path, ends = tmp_path / "cut.ckpt", []
    for callbacks, resume in (([SaveAt(2, path)], None), ([], path)):
        model = small_ijepa(view_weight=1.0, view_start_fraction=0.5)
        run = trainer(tmp_path, max_epochs=1, callbacks=callbacks)
        run.fit(model, small_crops(image_root, batch_size=4), ckpt_path=resume, weights_only=True)
        ends.append((run.global_step, model.state_dict()))
    assert ends[0][0] == ends[1][0] == 6
    assert all(torch.equal(value, ends[1][1][name]) for name, value in ends[0][1].items())
