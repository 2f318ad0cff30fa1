"""Decoded roll-outs: the figures of models of which they are known, and of real ones."""

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import small_dynamics, small_trajectories, trainer
from test_encoder_decoder import saved
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.functional.image import structural_similarity_index_measure

from callbacks import LastCheckpoint
from datamodules.batches import ClipBatch
from jepa_lightning import EncoderDecoder
from jepa_lightning.cli import main
from jepa_lightning.probes import ForecastProbe, ImageDecoder
from jepa_lightning.probes.dynamics.forecast_report import shown_steps

SHAPE = (3, 16, 16)
SIZE = math.prod(SHAPE)


class Ramp(pl.LightningDataModule):
    """Noise whose brightness an action changes: the next image is this one and the action, the same at all pixels."""

    batch_type = ClipBatch

    def __init__(self, sizes: tuple[int, ...] = (3, 3, 1), windows: int = 7) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.batches = []
        for size in sizes:
            actions = 0.1 * torch.rand(size, windows - 1, 1, generator=generator) - 0.03
            first = 0.6 * torch.rand(size, 1, *SHAPE, generator=generator)
            change = torch.cat([torch.zeros(size, 1, 1), actions.cumsum(dim=1)], dim=1)
            self.batches.append(ClipBatch(first + change[..., None, None], actions=actions))

    def test_dataloader(self) -> Any:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]


class Adds(nn.Module):
    """A predictor that knows the ramp; times 0, one that predicts no change."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, features: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return features + self.factor * actions


def probe_of(root: Path, factor: float, blur: float = 1.0, **arguments: Any) -> ForecastProbe:
    """A probe of a model whose embeddings are pixels, whose predictor is `Adds`, and whose decoder dims by `blur`."""
    model = EncoderDecoder(image_size=16, action_dim=1, latent_dim=8, encoder_widths=(4,), decoder_width=32)
    run = trainer(root, max_steps=0, barebones=False)
    run.strategy.connect(model)
    run.save_checkpoint(root / "fake.ckpt")
    probe = ForecastProbe(str(root / "fake.ckpt"), **arguments)
    probe.jepa.target_encoder = nn.Flatten()
    probe.jepa.predictor = Adds(factor)
    probe.jepa.decoder = nn.Sequential(nn.Unflatten(1, SHAPE), Dims(blur))
    return probe


class Dims(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.factor * images


def report_of(root: Path, probe: ForecastProbe, data: Any) -> dict[str, Any]:
    trainer(root).test(probe, datamodule=data, verbose=False)
    return json.loads((root / "report.json").read_text())


def test_an_almost_perfect_model_has_hardly_an_error_and_listens_to_its_actions(tmp_path: Path) -> None:
    data = Ramp()
    report = report_of(tmp_path, probe_of(tmp_path, 0.99), data)  # at 1, nothing could be divided by its error
    assert (report["steps"], report["clips"]) == (6, 7)
    assert set(report["true_over_persistence"]) == {"1", "2", "4", "6"} == set(report["shuffled_over_true"])
    assert all(ratio == pytest.approx(1e-4, rel=1e-2) for ratio in report["true_over_persistence"].values())
    assert all(ratio > 100 for ratio in report["shuffled_over_true"].values())
    assert report["reconstruction_error"] == 0 and report["reconstruction_similarity"] == pytest.approx(1, abs=1e-4)
    assert report["structural_similarity"]["true"]["6"] == pytest.approx(1, abs=1e-3)
    assert report["structural_similarity"]["persistence"]["6"] < report["structural_similarity"]["true"]["6"]
    images = torch.cat([batch.observations for batch in data.batches])
    for step in (1, 2, 4, 6):
        similarity = structural_similarity_index_measure(images[:, 0], images[:, step], data_range=(0.0, 1.0))
        assert report["structural_similarity"]["persistence"][str(step)] == pytest.approx(similarity.item(), rel=1e-4)
    still = (images[:, :1] - images[:, 1:]).square().mean(dim=(0, 2, 3, 4))
    torch.testing.assert_close(torch.tensor(report["squared_error"]["persistence"]), still)
    mean = images[:, 1:].mean(dim=(0, 1))
    around = (images[:, 1:] - mean).square().mean(dim=(0, 2, 3, 4))
    torch.testing.assert_close(torch.tensor(report["squared_error"]["mean_image"]), around)
    # The first clip has none before it, and takes the actions of the last of its batch; all others those of the one before.
    actions = torch.cat([batch.actions for batch in data.batches])[..., 0]
    others = torch.cat([actions[2:3], actions[:-1]])
    wrong = (0.99 * others.cumsum(dim=1) - actions.cumsum(dim=1)).square().mean(dim=0)
    torch.testing.assert_close(torch.tensor(report["squared_error"]["shuffled"]), wrong)
    for name in ("report.md", "forecast.png", "forecast.mp4", "forecast.gif"):
        assert (tmp_path / name).stat().st_size > 100, name


def test_who_predicts_no_change_is_persistence_and_deaf_to_actions(tmp_path: Path) -> None:
    report = report_of(tmp_path, probe_of(tmp_path, 0.0), Ramp((3, 3)))
    for name in ("true_over_persistence", "shuffled_over_true"):
        assert all(ratio == pytest.approx(1, rel=1e-5) for ratio in report[name].values())
    errors = report["squared_error"]
    assert errors["true"] == pytest.approx(errors["persistence"]) and len(errors["true"]) == 6
    assert report["structural_similarity"]["true"] == pytest.approx(report["structural_similarity"]["persistence"])


def test_the_decoder_s_floor_is_seen(tmp_path: Path) -> None:
    data = Ramp()
    report = report_of(tmp_path, probe_of(tmp_path, 1.0, blur=0.5), data)
    images = torch.cat([batch.observations for batch in data.batches])
    assert report["reconstruction_error"] == pytest.approx(images[:, 0].square().mean().item() / 4, rel=1e-4)
    assert report["squared_error"]["true"][-1] == pytest.approx(images[:, -1].square().mean().item() / 4, rel=1e-4)
    assert report["reconstruction_similarity"] < 0.99
    assert f"{report['reconstruction_error']:.5f}" in (tmp_path / "report.md").read_text()


def test_fewer_steps_and_single_clips(tmp_path: Path) -> None:
    data = Ramp((1, 1))
    report = report_of(tmp_path, probe_of(tmp_path, 0.99, steps=3), data)
    first, second = (batch.actions[0, :3, 0].cumsum(dim=0) for batch in data.batches)
    wrong = (0.99 * first - second).square()  # of the second clip alone
    torch.testing.assert_close(torch.tensor(report["squared_error"]["shuffled"]), wrong, rtol=1e-3, atol=1e-7)
    assert report["steps"] == 3 and len(report["squared_error"]["true"]) == 3
    assert set(report["shuffled_over_true"]) == {"1", "2", "3"}, "the second clip is given the actions of the first"
    report = report_of(tmp_path / "alone", probe_of(tmp_path, 1.0, steps=1), Ramp((1,)))
    assert "shuffled_over_true" not in report and not (tmp_path / "alone" / "forecast.png").exists()
    assert [shown_steps(count) for count in (1, 2, 4, 9)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 9]]


@pytest.mark.parametrize("feedback", ["pixels", "latent"])
def test_it_reads_an_encoder_decoder(tmp_path: Path, points_root: Path, feedback: str) -> None:
    data = small_trajectories(points_root, history=2)
    path = saved(tmp_path, data, feedback=feedback)
    probe = ForecastProbe(path)
    report = report_of(tmp_path, probe, data)
    assert report["steps"] == 4 and report["shuffled_over_true"]["4"] != 1
    batch = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)
    images = probe.jepa.forecast_images(probe.jepa.encode_batch(batch)[:, 0], 4, batch.actions)[:, :, 3:]
    error = (images - batch.observations[:, 1:, 3:]).square().mean(dim=(0, 2, 3, 4))
    assert len(data.test_dataloader()) == 1
    torch.testing.assert_close(torch.tensor(report["squared_error"]["true"]), error)


def test_it_reads_a_jepa_with_its_image_decoder(tmp_path: Path, points_root: Path) -> None:
    data = small_trajectories(points_root)

    def fit(root: Path, module: Any) -> str:
        trainer(root, max_steps=2, enable_checkpointing=True, callbacks=[LastCheckpoint()]).fit(module, data)
        return str(root / "checkpoints" / "last.ckpt")

    model = small_dynamics(data)
    nn.init.normal_(model.predictor.change[-1].weight, std=0.3)
    path = fit(tmp_path, model)
    decoder = fit(tmp_path / "decoder", ImageDecoder(path, width=32, depth=1))
    asked = ["--config", "probes/forecast", "--model.checkpoint", path, "--model.decoder", decoder]
    named = ["--data", "Trajectories", "--data.root", str(points_root), "--data.windows", "5", "--data.batch_size", "2"]
    run = ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path / "forecast")]
    main(["test", *asked, *named, *run, "--trainer.enable_progress_bar", "false"])
    report = json.loads((tmp_path / "forecast" / "report.json").read_text())
    probe = ForecastProbe(path, decoder)
    batch = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)
    images = probe.decoder.decode(probe.jepa.rollout(batch.observations[:, 0], 4, batch.actions))
    error = (images - batch.observations[:, 1:]).square().mean(dim=(0, 2, 3, 4))
    torch.testing.assert_close(torch.tensor(report["squared_error"]["true"]), error)
    with pytest.raises(ValueError, match="which decodes no images: fit an ImageDecoder"):
        ForecastProbe(path)
    other = fit(tmp_path / "other", small_dynamics(data, momentum=0.5))
    with pytest.raises(ValueError, match="decodes another JEPA"):
        ForecastProbe(other, decoder)
    with pytest.raises(ValueError, match="model.steps=0"):
        ForecastProbe(path, decoder, steps=0)
    with pytest.raises(ValueError, match="model.steps=5 needs clips of more than 5 windows; the data's have 5"):
        trainer(tmp_path).test(ForecastProbe(path, decoder, steps=5), datamodule=data, verbose=False)
