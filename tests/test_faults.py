"""A few runs of the campaign of `make campaign`, each cut and resumed."""

import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize("family", ["pendulum", "worlds", "ijepa"])
def test_runs_that_are_cut_end_as_if_they_were_not(family: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), "--cuts", "1", "--full", "1", "--families", family]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert '"runs": 5, "cuts": ' in done.stdout and '"lost": 0' in done.stdout
