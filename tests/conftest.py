"""What the tests share: the smallest data and models that do everything."""

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from datamodules import DoublePendulum
from jepa_lightning import PendulumJEPA

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)  # threads only wait for each other at these sizes

SMALL_DATA: dict[str, Any] = {
    "size": 24,
    "sequence_length": 10,
    "clip_length": 8,
    "val_size": 4,
    "test_size": 3,
    "observation": "coordinates",
    "batch_size": 4,
}
SMALL_MODEL: dict[str, Any] = {
    "observation": "coordinates",
    "encoder_widths": (16,),
    "latent_dim": 8,
    "predictor_width": 16,
    "horizon": 4,
}


@pytest.fixture(autouse=True)
def one_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns when pytest's own arguments stand in sys.argv beside the ones it is given."""
    monkeypatch.setattr(sys, "argv", ["jepa-lightning"])


def small_data(**changes: Any) -> DoublePendulum:
    return DoublePendulum(**(SMALL_DATA | changes))


def small_model(**changes: Any) -> PendulumJEPA:
    torch.manual_seed(0)
    return PendulumJEPA(**(SMALL_MODEL | changes))


def trainer(root: Path, **changes: Any) -> pl.Trainer:
    """A quiet trainer on one CPU."""
    settings: dict[str, Any] = {
        "default_root_dir": root,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    with warnings.catch_warnings():
        return pl.Trainer(**(settings | changes))


def parameters_equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Bit for bit."""
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(name == other and torch.equal(value, value2) for (name, value), (other, value2) in pairs)
