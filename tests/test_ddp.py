"""Two processes on CPU: one target, different data, and the gradients and statistics of a single process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

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

out, devices, accumulate = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
record = Record()
run = trainer(out, devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=2, limit_val_batches=1.0,
              callbacks=[record], accumulate_grad_batches=accumulate, check_val_every_n_epoch=1)
model = small_model(momentum=0.9)
run.fit(model, small_data(batch_size=4 // devices, val_size=8))
torch.save(model.state_dict(), out / f"rank{run.global_rank}.pt")
metrics = {name: value.item() for name, value in run.callback_metrics.items()}
(out / f"rank{run.global_rank}.json").write_text(json.dumps(
    {"seen": record.seen, "targets": record.losses, "steps": run.global_step, "metrics": metrics}))
"""


def run(out: Path, devices: int, accumulate: int) -> list[tuple[dict, dict]]:
    out.mkdir()
    script = out / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    environment.pop("LOCAL_RANK", None)
    arguments = [sys.executable, str(script), str(out), str(devices), str(accumulate)]
    done = subprocess.run(arguments, env=environment, cwd=out, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        (json.loads((out / f"rank{rank}.json").read_text()), torch.load(out / f"rank{rank}.pt", weights_only=True))
        for rank in range(devices)
    ]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_two_processes_equal_one_on_the_same_global_batch(tmp_path: Path, accumulate: int) -> None:
    ((alone, weights),) = run(tmp_path / "one", 1, accumulate)
    (first, weights0), (second, weights1) = run(tmp_path / "two", 2, accumulate)

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
