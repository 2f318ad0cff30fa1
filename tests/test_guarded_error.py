"""The figure that a checkpoint can be chosen by without labels: collapse does not fool it as it fools the others."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from conftest import FAMILIES, small_data, small_model, trainer

from callbacks import CollapseAlarm
from jepa_lightning.rollouts import ForecastErrors, later_features


def validated(tmp_path: Path, model, data, **settings) -> dict[str, float]:
    run = trainer(tmp_path, limit_val_batches=1.0, **({"max_epochs": 1} | settings))
    run.fit(model, data)
    return {name: value.item() for name, value in run.callback_metrics.items()}


class Record(pl.Callback):
    def __init__(self) -> None:
        self.figures: list[dict[str, float]] = []

    def on_validation_end(self, trainer, pl_module) -> None:
        self.figures.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def test_it_falls_in_a_healthy_run_while_the_loss_rises(tmp_path: Path) -> None:
    """And it is what it says: of the two ratios the larger, for the dimensions that are used."""
    record, quiet = Record(), CollapseAlarm(grace_steps=1000)
    model = small_model(latent_dim=16, encoder_widths=(64,), learning_rate=3e-3, regularizer_weights={"covariance": 0.1})
    data = small_data(size=200, val_size=16, sequence_length=12, clip_length=12, batch_size=20)
    validated(tmp_path, model, data, max_epochs=40, check_val_every_n_epoch=10, callbacks=[record, quiet])
    for figures in record.figures:
        ratio = max(figures["val/persistence_ratio"], figures["val/normalized_error"])
        expected = 1 - max(0, 1 - ratio) * figures["val/rankme"] / 16
        assert figures["val/guarded_error"] == pytest.approx(expected, abs=1e-5)
    guarded = [figures["val/guarded_error"] for figures in record.figures]
    assert 0.5 < guarded[-1] < 0.97 and guarded[-1] < guarded[0] - 0.02
    assert record.figures[-1]["val/loss"] > record.figures[0]["val/loss"], "the targets grow: the loss says the opposite"


def forecast_ratios(features: torch.Tensor, guess) -> dict[str, float]:
    """Ratios of forecasts three steps ahead of embeddings (B, T, D), made by guess(starts) -> (B, S, 1, D)."""
    errors = ForecastErrors(acted=False, dim=features.shape[-1])
    for part in features.split(30):
        starts, targets = part[:, :-3], later_features(part, 3)
        errors.update(lambda z, _: guess(z[:, :, None]).expand(-1, -1, 3, -1), starts, targets, None)
    found = {name: value.item() for name, value in errors.compute().items()}
    assert not errors.over_mean.update_called, "compute starts anew"
    return found


def test_what_fools_one_baseline_does_not_fool_the_other() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 5 + torch.randn(200, 9, 6, generator=generator)
    found = forecast_ratios(noise, lambda starts: torch.full_like(starts, 5))
    assert found["persistence_ratio"] == pytest.approx(0.5, abs=0.02), "noise looks well forecast"
    assert found["normalized_error"] == pytest.approx(1, abs=0.02), "and is not"
    still = torch.randn(200, 1, 6, generator=generator) + 0.01 * torch.randn(200, 9, 6, generator=generator)
    found = forecast_ratios(still, lambda starts: starts)
    assert found["persistence_ratio"] == found["persistence_ratio_first"] == 1, "what hardly changes is copied"
    assert found["normalized_error"] < 0.01


def test_a_constant_world_model_has_no_error_and_is_the_worst(tmp_path: Path) -> None:
    model = small_model(learning_rate=1e-9)
    for encoder in (model.context_encoder, model.target_encoder):
        torch.nn.init.zeros_(encoder[-1].weight)
    figures = validated(tmp_path, model, small_data())
    assert figures["val/loss"] < 1e-6
    assert figures["val/guarded_error"] > 0.999


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_images_logs_it_and_a_collapsed_one_is_the_worst(tmp_path: Path, image_root: Path, family: str) -> None:
    model, data = FAMILIES[family]
    figures = validated(tmp_path, model(), data(image_root), max_epochs=8, check_val_every_n_epoch=8)
    ratio, rankme = figures["val/position_normalized_error"], figures["val/rankme"]
    assert figures["val/guarded_error"] == pytest.approx(1 - max(0, 1 - ratio) * rankme / 192, abs=1e-5)
    assert 0.2 < ratio < 5
    jepa = model(learning_rate=1e-9, normalize_targets=False)
    for encoder in (jepa.context_encoder, jepa.target_encoder):
        torch.nn.init.zeros_(encoder.vit.norm.weight)
    figures = validated(tmp_path, jepa, data(image_root))
    assert figures["val/guarded_error"] > 0.999


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_images_that_knows_places_alone_is_the_worst(
    tmp_path: Path, image_root: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers with the mean of each place: far better than one answer for all, and yet nothing."""
    model, data = FAMILIES[family]
    jepa = model(learning_rate=1e-9)
    places = torch.randn(16, 192, generator=torch.Generator().manual_seed(0))
    jepa.encode = lambda images: places + 1e-2 * images.flatten(1)[:, :192, None].transpose(1, 2)
    jepa.predict_hidden = lambda context, masks, batch: jepa.to_target_space(places)[masks.targets] + 0 * context.sum()
    monkeypatch.setattr("jepa_lightning.image_jepa.show_images", lambda *_: None)
    figures = validated(tmp_path, jepa, data(image_root))
    assert figures["val/normalized_error"] < 0.1 and figures["val/position_normalized_error"] > 0.5
    assert not jepa.monitor.over_places.update_called, "each validation starts anew"
    assert figures["val/guarded_error"] > 0.99
