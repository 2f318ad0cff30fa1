"""The weight decay of every optimizer step, and whose it is."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import small_data, small_model, trainer
from lightning.pytorch import Callback
from torch import nn

from callbacks import WeightDecaySchedule
from callbacks.schedules import cosine


def run_of(total: int, *names: str | None) -> SimpleNamespace:
    """What the schedule reads of a trainer: two optimizers with a parameter group of each name."""
    optimizers = []
    for _ in range(2):
        groups = [{"params": [nn.Parameter(torch.zeros(1))], "name": name} for name in names]
        optimizers.append(torch.optim.AdamW([group if group["name"] else {"params": group["params"]} for group in groups]))
        for group in optimizers[-1].param_groups:
            group["weight_decay"] = 0.7
    return SimpleNamespace(optimizers=optimizers, estimated_stepping_batches=total, global_step=0)


def decays(run: SimpleNamespace) -> list[list[float]]:
    return [[group["weight_decay"] for group in optimizer.param_groups] for optimizer in run.optimizers]


@pytest.mark.parametrize("offset", [0, 1])
def test_groups_named_decay_follow_a_cosine_and_no_other(offset: int) -> None:
    schedule, run = WeightDecaySchedule(0.04, 0.4, offset), run_of(4, "no_decay", "decay", None)
    schedule.on_train_start(run, None)
    for step in range(4):
        schedule.steps = step
        schedule.on_train_batch_start(run, None, None, 0)
        value = cosine(step + offset, 4, 0.04, 0.4)
        assert decays(run) == [[0.7, value, 0.7]] * 2
    assert value == 0.4 if offset else value < 0.4


class Used(Callback):
    """The decays with which each optimizer step was taken."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.values: list[tuple[float, float]] = []
        optimizer = trainer.optimizers[0]

        def before(*_: Any) -> None:
            self.values.append(tuple(group["weight_decay"] for group in optimizer.param_groups))

        optimizer.register_step_pre_hook(before)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_each_step_of_a_run_is_taken_with_its_own(tmp_path: Path, accumulate: int) -> None:
    used = Used()
    run = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[used])
    run.fit(small_model(weight_decay=0.1, final_weight_decay=0.5), small_data())  # 6 batches
    total = 6 // accumulate
    assert used.values == [(cosine(step, total, 0.1, 0.5), 0.0) for step in range(total)]


@pytest.mark.parametrize(("start", "end"), [(-0.1, 0.1), (0.1, -0.1)])
def test_negative_decays_are_refused(start: float, end: float) -> None:
    with pytest.raises(ValueError, match=f"weight decay from {start} to {end}: both must be >= 0"):
        WeightDecaySchedule(start, end)
    assert WeightDecaySchedule(0.0, 0.0).offset == 0


def test_a_model_without_the_group_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter group named 'decay'"):
        WeightDecaySchedule(0.1, 0.2).on_train_start(run_of(4, "no_decay", None), None)
