"""What a run says before it begins."""

import logging
from pathlib import Path

import pytest
import torch
from conftest import small_data, small_model, trainer

from callbacks import StartUp
from callbacks.startup import describe, quiet, readable
from jepa_lightning import run_defaults
from jepa_lightning.cli import main


def test_sizes_are_readable() -> None:
    assert [readable(count) for count in (7, 1234, 5_400_000, 2 * 10**9)] == ["7", "1.2 k", "5.4 M", "2.0 G"]


def test_four_lines_say_what_is_trained_and_where(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = small_model()
    run = trainer(tmp_path, max_steps=1, max_epochs=3, callbacks=[StartUp()])
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        run.fit(model, small_data())
    trained = sum(p.numel() for network in model.trained_networks() for p in network.parameters())
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith(f"PendulumJEPA: {readable(trained)} trained parameters (context_encoder ") for line in said)
    assert any(line.startswith("1 x CPU (") and "precision 32-true, 3 epochs of 6 batches." in line for line in said)
    assert f"Written to {tmp_path}." in said
    assert describe(run, model)[2] == f"Written to {tmp_path}, going on at optimizer step 1."


def test_the_command_line_is_quiet_about_the_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = ["fit", "--model", "PendulumJEPA", "--model.observation=coordinates", "--model.encoder_widths", "[8]"]
    arguments += ["--data", "DoublePendulum", "--data.observation=coordinates", "--data.size=80", "--data.val_size=4"]
    arguments += ["--trainer.max_steps=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        main([*arguments, "--trainer.limit_val_batches=0", f"--trainer.default_root_dir={tmp_path}"])
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert f"tensorboard --logdir {tmp_path}" in text and f"Written to {tmp_path}." in text
    for noise in ("litlogger", "TPU available", "FLOPs", "Loading `train_dataloader`"):
        assert noise not in text
    quiet()
    filters = logging.getLogger("lightning.pytorch.utilities.rank_zero").filters
    assert len(filters) == 1, "once, however often it is called"


def test_a_mac_computes_on_its_cpu_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (
        run_defaults.accelerator("auto") == "cpu"
        and run_defaults.accelerator("mps") == "mps"
        and run_defaults.accelerator("gpu") == "gpu"
    )
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert run_defaults.accelerator("auto") == "auto"
