"""Threads and memory on a CPU."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, small_data, small_model, trainer

from jepa_lightning import cpu
from jepa_lightning.weights.checkpoints import read_checkpoint

# user nice system idle iowait irq softirq steal, in ticks
QUIET, BUSY = [100, 0, 50, 5000, 40, 0, 5, 0], [0, 0, 0, 0, 0, 0, 0, 0]


@pytest.fixture
def threads() -> Iterator[None]:
    """Give the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("spent", "cores", "free"),
    [
        ([0, 0, 0, 60, 0, 0, 0, 0], 2, 2),
        ([30, 0, 0, 30, 0, 0, 0, 0], 2, 1),  # one of two is taken
        ([0, 30, 0, 20, 10, 0, 0, 0], 2, 1),  # by something nice; waiting for a disk is free
        ([60, 0, 0, 0, 0, 0, 0, 0], 2, 1),  # one at least
        ([40, 0, 20, 180, 0, 0, 0, 0], 8, 6),
        ([10, 0, 0, 0, 0, 0, 0, 50], 2, 1),  # other guests of the machine
        ([0, 0, 0, 0, 0, 0, 0, 0], 4, 1),  # the clock stood still
    ],
)
def test_free_cores(spent: list[int], cores: int, free: int) -> None:
    after = [before + ticks for before, ticks in zip(QUIET, spent, strict=True)]
    assert cpu.idle_cores(QUIET, after, cores) == free


def test_ticks_are_those_of_all_cores_by_kind() -> None:
    if not os.path.exists("/proc/stat"):
        pytest.skip("no /proc/stat on this system")
    first, second = cpu.ticks(), cpu.ticks()
    assert len(first) == 8 and all(later >= earlier >= 0 for earlier, later in zip(first, second, strict=True))


@pytest.mark.usefixtures("threads")
def test_threads_are_as_many_as_cores_are_free_and_no_more_than_there_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cpu.THREADS_VARIABLE, raising=False)
    monkeypatch.setattr(cpu.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(cpu.os.path, "exists", lambda path: path == "/proc/stat")
    monkeypatch.setattr(cpu.os, "cpu_count", lambda: 8)
    for idle, found in ((8, 3), (2, 2), (0, 1)):
        torch.set_num_threads(3)
        readings = iter([BUSY, [8 - idle, 0, 0, idle, 0, 0, 0, 0]])
        monkeypatch.setattr(cpu, "ticks", lambda readings=readings: next(readings))
        assert cpu.choose_threads() == torch.get_num_threads() == found
    monkeypatch.setenv(cpu.THREADS_VARIABLE, "3")
    torch.set_num_threads(3)
    assert cpu.choose_threads() == 3, "the user has said how many"


def test_freed_memory_is_kept_where_the_library_can() -> None:
    script = "from jepa_lightning.cpu import keep_freed_memory; print(keep_freed_memory())"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(platform.libc_ver()[0] == "glibc")


@pytest.mark.usefixtures("threads")
def test_a_run_that_goes_on_has_the_threads_that_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jepa_lightning.cli import main

    torch.set_num_threads(3)
    run = trainer(tmp_path, max_steps=2)
    run.fit(small_model(), small_data())
    run.save_checkpoint(tmp_path / "cut.ckpt")
    assert read_checkpoint(tmp_path / "cut.ckpt")["threads"] == 3
    torch.set_num_threads(1)
    names = ("encoder_widths", "latent_dim", "predictor_width", "horizon", "observation")
    values = ("[16]", "8", "16", "4", "coordinates")
    model = [f"--model.{name}={value}" for name, value in zip(names, values, strict=True)]
    sizes = {
        "size": 24,
        "sequence_length": 10,
        "clip_length": 8,
        "val_size": 4,
        "batch_size": 4,
        "observation": "coordinates",
    }
    data = [f"--data.{name}={value}" for name, value in sizes.items()]
    arguments = [
        "fit",
        "--model=PendulumJEPA",
        *model,
        "--data=DoublePendulum",
        *data,
        f"--ckpt_path={tmp_path / 'cut.ckpt'}",
    ]
    arguments += [f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.accelerator=cpu", "--trainer.max_steps=3"]
    monkeypatch.setenv(cpu.THREADS_VARIABLE, "1")
    main([*arguments, "--trainer.enable_progress_bar=false"])
    assert torch.get_num_threads() == 1
    monkeypatch.delenv(cpu.THREADS_VARIABLE)
    main([*arguments, "--trainer.enable_progress_bar=false"])
    assert torch.get_num_threads() == 3
