"""A few runs of the campaign of `make campaign`, each cut and resumed."""

import subprocess
import sys

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
