import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jepa_lightning import DoublePendulum, PendulumJEPA, load
from jepa_lightning.dynamics_checks import check_observations

ROOT = Path(__file__).parents[1]
LAB = ROOT / "docs" / "lab"
CHECKPOINT = LAB / "world_model.ckpt"

WRITTEN = {
    "1_learn.py": {"frames.png", "learn_steps.png", "learn.png"},
    "2_collapse.py": {"collapse_curves.png", "collapse.png"},
    "3_plan.py": {"plan.gif", "plan.png"},
}


def test_every_notebook_is_tested() -> None:
    assert {file.name for file in LAB.glob("[0-9]*.py")} == set(WRITTEN)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_notebook_runs_as_a_script(name: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LAB_FAST": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, str(LAB / name)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    files = {file.name: file.stat().st_size for file in (tmp_path / "runs" / "lab").iterdir()}
    assert set(files) == WRITTEN[name]
    assert all(files.values())


@pytest.mark.parametrize("name", WRITTEN)
def test_a_notebook_is_cells_with_questions_and_answers(name: str) -> None:
    lines = (LAB / name).read_text().splitlines()
    assert "#       format_name: percent" in lines
    assert lines.count("# %% [markdown]") > 3
    assert lines.count("# %%") > 3
    assert "# ## Questions" in lines
    assert "# <details><summary>Answers</summary>" in lines
    assert "# </details>" in lines


def test_the_world_model_is_small_and_loads() -> None:
    assert CHECKPOINT.stat().st_size <= 3e6
    content = torch.load(CHECKPOINT, weights_only=True)
    assert not {"optimizer_states", "lr_schedulers", "loops", "callbacks"} & content.keys()
    model = load(CHECKPOINT)
    assert isinstance(model, PendulumJEPA)
    check_observations(model, DoublePendulum(history=3, torque_limits=(10.0, 5.0), stride=5))
    assert all(torch.isfinite(weights).all() for weights in model.state_dict().values())
