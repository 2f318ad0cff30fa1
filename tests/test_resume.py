"""A run that was killed and resumed ends with the weights of the run that was not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from jepa_lightning.weights.checkpoints import read_checkpoint
from jepa_lightning.weights.io import AtomicCheckpointIO

STEPS = 120  # 40 batches an epoch, three epochs; saved every 7 steps, so never at the end of an epoch but the last


def command(root: Path, num_workers: int, *extra: str) -> list[str]:
    return [
        sys.executable, "-m", "jepa_lightning", "fit",
        "--config", str(ROOT / "configs" / "pendulum" / "coordinates.yaml"),
        "--model.latent_dim", "8", "--model.encoder_widths", "[16]", "--model.predictor_width", "16",
        "--model.horizon", "4",
        "--data.size", "320", "--data.sequence_length", "10", "--data.clip_length", "8", "--data.val_size", "4",
        "--data.batch_size", "8", "--data.num_workers", str(num_workers),
        "--trainer.max_epochs", "3", "--trainer.max_steps", "-1", "--trainer.accelerator", "cpu",
        "--trainer.val_check_interval", "1.0", "--trainer.check_val_every_n_epoch", "1",
        "--trainer.default_root_dir", str(root), "--trainer.logger", "false", "--trainer.enable_progress_bar", "false",
        "--trainer.callbacks+=LastCheckpoint", "--trainer.callbacks.every_n_train_steps", "7",
        *extra,
    ]  # fmt: skip


def finish(arguments: list[str]) -> None:
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, env=quiet(), timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def quiet() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def last(root: Path) -> Path:
    return root / "checkpoints" / "last.ckpt"


def kill_after(arguments: list[str], path: Path, step: int) -> int:
    """Start a run, kill it with SIGKILL once its checkpoint is past `step`, and return the step of the checkpoint."""
    process = subprocess.Popen(arguments, cwd=ROOT, env=quiet(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if path.exists() and read_checkpoint(path)["global_step"] >= step:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    return read_checkpoint(path)["global_step"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_killed_in_the_middle_of_an_epoch_and_resumed_equals_uncut(tmp_path: Path, num_workers: int) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(command(whole, num_workers))
    step = kill_after(command(cut, num_workers), last(cut), 49)
    assert 49 <= step < STEPS and step % 40 != 0, f"killed at step {step}, not in the middle of an epoch"
    finish(command(cut, 2 - num_workers, "--ckpt_path", "last"))

    expected, resumed = read_checkpoint(last(whole)), read_checkpoint(last(cut))
    assert expected["global_step"] == resumed["global_step"] == STEPS
    for name, value in expected["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    assert expected["lr_schedulers"] == resumed["lr_schedulers"]


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"state_dict": {"w": torch.ones(3)}, "hyper_parameters": {}}, path)

    def disk_full(_: object, file: object) -> None:
        file.write(b"half of a checkpoint")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        io.save_checkpoint({}, path)
    assert torch.equal(read_checkpoint(path)["state_dict"]["w"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_write_that_is_killed_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.ones(3)}, "hyper_parameters": {}}, path)
    script = f"""
import os, signal, torch
from jepa_lightning.weights.io import AtomicCheckpointIO
def killed(_, file):
    file.write(b"half of a checkpoint")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = killed
AtomicCheckpointIO().save_checkpoint({{}}, {str(path)!r})
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=quiet(), capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert torch.equal(read_checkpoint(path)["state_dict"]["w"], torch.ones(3))
