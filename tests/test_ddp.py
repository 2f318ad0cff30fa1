"""Two processes on CPU: one target, different data, and the gradients and statistics of a single process."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_here, run_script

SCRIPT = """
import json, sys
from pathlib import Path
import torch
import lightning.pytorch as pl
from conftest import small_data, small_model, trainer

class Record(pl.Callback):
    def __init__(self):
        self.seen, self.losses = [], []
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen += batch.states[:, 0, 0].tolist()
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        target = torch.nn.utils.parameters_to_vector(module.target_encoder.parameters())
        self.losses.append(target.double().sum().item())

out, devices = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
for accumulate in json.loads(sys.argv[3]):
    record = Record()
    run = trainer(out, devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=2, limit_val_batches=1.0,
                  callbacks=[record], accumulate_grad_batches=accumulate, check_val_every_n_epoch=1)
    model = small_model(momentum=0.9)
    run.fit(model, small_data(batch_size=4 // devices, val_size=8))
    name = f"{accumulate}_rank{run.global_rank}"
    torch.save(model.state_dict(), out / f"{name}.pt")
    metrics = {key: value.item() for key, value in run.callback_metrics.items()}
    (out / f"{name}.json").write_text(json.dumps(
        {"seen": record.seen, "targets": record.losses, "steps": run.global_step, "metrics": metrics}))
"""
ACCUMULATED = (1, 3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process and two have written: they are started once for all accumulations."""
    folder = tmp_path_factory.mktemp("ddp")
    run_here(SCRIPT, folder / "of1", "1", json.dumps(ACCUMULATED))
    run_script(SCRIPT, folder / "of2", "2", json.dumps(ACCUMULATED))
    return folder


def outcomes(runs: Path, devices: int, accumulate: int) -> Iterator[tuple[dict, dict]]:
    """What each process has seen and measured, and its weights."""
    for rank in range(devices):
        file = runs / f"of{devices}" / f"{accumulate}_rank{rank}"
        yield json.loads(file.with_suffix(".json").read_text()), torch.load(file.with_suffix(".pt"), weights_only=True)


@pytest.mark.parametrize("accumulate", ACCUMULATED)
def test_two_processes_equal_one_on_the_same_global_batch(runs: Path, accumulate: int) -> None:
    ((alone, weights),) = outcomes(runs, 1, accumulate)
    (first, weights0), (second, weights1) = outcomes(runs, 2, accumulate)

    assert alone["steps"] == first["steps"] == second["steps"] == 12 // accumulate
    for epoch in range(2):
        mine, theirs, all_of_them = (
            set(run["seen"][epoch * len(run["seen"]) // 2 : (epoch + 1) * len(run["seen"]) // 2])
            for run in (first, second, alone)
        )
        assert not mine & theirs, "both ranks saw the same trajectories"
        assert mine | theirs == all_of_them

    for name, value in weights0.items():
        assert torch.equal(value, weights1[name]), f"ranks disagree on {name}"
    assert first["targets"] == second["targets"], "ranks disagree on the target after some step"
    for name, value in weights.items():
        torch.testing.assert_close(weights0[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")

    for name, value in alone["metrics"].items():
        # The online probe fits on every other row of a batch, which are other rows in smaller batches.
        if name.startswith(("val/", "train/regularizer")) and "linear_r2" not in name:
            assert first["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
            assert second["metrics"][name] == pytest.approx(first["metrics"][name], rel=1e-6, abs=1e-8), name


SIGNALLED = """
import os, signal, sys
import torch
from lightning.pytorch import Callback
from conftest import small_data, small_model, trainer
from callbacks import LastCheckpoint, Preemption

class Signal(Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == 3 and os.environ.get("LOCAL_RANK") == "1":
            os.kill(os.getpid(), signal.SIGTERM)

out, resume = sys.argv[1:]
callbacks = [LastCheckpoint(), Preemption()] + ([] if resume else [Signal()])
run = trainer(out, devices=2, strategy="ddp", max_steps=9, callbacks=callbacks, enable_checkpointing=True)
run.fit(small_model(momentum=0.9), small_data(batch_size=2), ckpt_path=resume or None, weights_only=True)
"""


def test_a_signal_to_one_process_ends_all_of_them_in_the_same_step(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SIGNALLED)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    environment.pop("LOCAL_RANK", None)
    last, codes = tmp_path / "checkpoints" / "last.ckpt", []
    for resume in ("", str(last)):
        arguments = [sys.executable, str(tmp_path / "script.py"), str(tmp_path), resume]
        done = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, timeout=200, check=False)
        codes.append((done.returncode, torch.load(last, weights_only=True)["global_step"]))
    assert codes == [(143, 5), (0, 9)], "agreed on one batch later"
