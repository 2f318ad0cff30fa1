"""Decoders of an actuated pendulum's embeddings, true and predicted ones."""

from pathlib import Path

import pytest
import torch
from conftest import parameters_equal, small_driven_data, trainer
from lightning.pytorch.callbacks import EarlyStopping
from test_planning import saved

from jepa_lightning.probes import DecoderProbe, ImageDecoder


@pytest.mark.parametrize("source", ["online", "target", "predicted"])
def test_state_decoder_learns_from_each_source(tmp_path: Path, source: str) -> None:
    probe = ImageDecoder(saved(tmp_path, image_size=16), embedding_source=source, width=32, depth=1, learning_rate=1e-2)
    before = {name: value.clone() for name, value in probe.jepa.state_dict().items()}
    data = small_driven_data(size=400, val_size=40, batch_size=40, image_size=16)
    run = trainer(tmp_path, max_epochs=50, limit_val_batches=1.0, check_val_every_n_epoch=50)
    run.fit(probe, data)
    metrics = run.callback_metrics
    assert metrics["val/loss"] == metrics[f"val/mse_{source}"]
    if source != "predicted":  # an untrained predictor says that nothing moves
        assert metrics["val/mse_over_mean"] < 0.95, "it knows more than the mean image"
    assert all(torch.equal(value, before[name]) for name, value in probe.jepa.state_dict().items())
    assert not any(module.training for module in probe.jepa.modules())
    assert {"val/iou_online", "val/iou_target", "val/iou_predicted", "val/iou_still"} <= set(metrics)
    assert (tmp_path / "reconstruction.png").exists()


def test_predicted_embeddings_are_decoded_to_the_frame_that_they_predict(tmp_path: Path) -> None:
    probe = ImageDecoder(saved(tmp_path), embedding_source="predicted", width=32, depth=1)
    data = small_driven_data()
    batch = data.observe(data.trajectories("train")[:2, :23])
    target = probe.jepa.encode(batch.observations)
    expected = probe.jepa.forecast(target[:, 0], 1, batch.actions[:, :1])[:, 0]
    torch.testing.assert_close(probe.features(batch, "predicted")["predicted"][:, 0], expected)
    assert torch.equal(probe.features(batch, "target")["target"], target[:, 1:])


def test_a_resumed_decoder_keeps_its_scale(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path)

    def fit(seed: int, ckpt_path: Path | None = None) -> ImageDecoder:
        torch.manual_seed(0)
        probe = ImageDecoder(checkpoint, width=32, depth=1)
        run = trainer(tmp_path, max_epochs=1, max_steps=-1)
        run.fit(probe, small_driven_data(seed=seed), ckpt_path=ckpt_path)
        run.save_checkpoint(tmp_path / "decoder.ckpt")
        return probe

    first, other = fit(0), fit(1)
    assert not torch.equal(first.decoder.mean, other.decoder.mean), "the scale is that of the data"
    with pytest.warns(UserWarning, match="data.seed was 1 and is 0"):
        resumed = fit(0, tmp_path / "decoder.ckpt")  # of the other data
    assert parameters_equal(resumed, other), "a finished run that is resumed changes nothing"


def test_the_decoder_stops_when_it_no_longer_learns(tmp_path: Path) -> None:
    stop = EarlyStopping("val/loss", patience=2, min_delta=1e-5)  # as in configs/probes/image_decoder.yaml
    run = trainer(tmp_path, max_epochs=9, limit_val_batches=1.0, callbacks=[stop])
    run.fit(ImageDecoder(saved(tmp_path), width=32, depth=1, learning_rate=1e-12), small_driven_data())
    assert run.current_epoch == 3


def test_the_decoder_probe_reads_an_actuated_pendulum(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=1.0)
    run.fit(DecoderProbe(saved(tmp_path), width=16), small_driven_data())
    assert run.callback_metrics["val/mse_jepa"] > 0
