"""A few runs of the campaign of `make campaign`, each cut and resumed."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faults
import pytest
from conftest import ROOT


@pytest.mark.timeout(600)
def test_runs_that_are_cut_end_as_if_they_were_not() -> None:
    """Every kind of cut once for each of three families, in one campaign, so that they share what was imported."""
    families = ("pendulum", "worlds", "ijepa")
    command = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), "--cuts", "1", "--full", "1", "--families", *families]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert f'"runs": {5 * len(families)}, "cuts": ' in done.stdout and '"lost": 0' in done.stdout


@pytest.mark.parametrize("kind", ["SIGKILL", "SIGINT", "full disk"])
@pytest.mark.parametrize(("log", "code", "expected"), [("`Trainer.fit` stopped", 0, None), ("an error", 1, 1)])
def test_a_run_that_ends_as_it_is_to_be_cut_was_not_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, log: str, code: int, expected: int | None
) -> None:
    (tmp_path / "run.log").write_text(log)
    (tmp_path / "run.log.code").write_text(str(code))
    monkeypatch.setattr(faults, "wait_until_begun", lambda *_: 0.0)
    gone: Any = SimpleNamespace(pid=2**22, exitcode=None, join=lambda *_: None)  # beyond the largest number of a process
    assert faults.cut(gone, tmp_path / "run", kind, 0.0) == expected
