"""The target encoder moves exactly once per optimizer step, by the momentum of that step."""

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import small_data, small_model, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import EMAUpdate
from callbacks.ema import update_average
from callbacks.schedules import cosine


class Shadow(Callback):
    """Average by hand: a hook on the optimizer itself sees each real step, and a plain loop averages."""

    def __init__(self, total: int) -> None:
        self.total, self.steps = total, 0
        self.average: list[torch.Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.steps = trainer.global_step
        self.average = [p.detach().clone() for p in pl_module.target_encoder.parameters()]
        optimizer = trainer.optimizers[0]

        def after_step(*_: Any) -> None:
            momentum = cosine(self.steps, self.total, 0.9, 1.0)
            for shadow, parameter in zip(self.average, pl_module.context_encoder.parameters(), strict=True):
                shadow.mul_(momentum).add_(parameter.detach(), alpha=1 - momentum)
            self.steps += 1

        optimizer.register_step_post_hook(after_step)

    def check(self, model: Any, steps: int) -> None:
        assert self.steps == steps
        for shadow, parameter in zip(self.average, model.target_encoder.parameters(), strict=True):
            torch.testing.assert_close(parameter, shadow, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_epochs": 2}, 12),  # 24 samples in batches of 4
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, 4),
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, 4),  # 4 + 2 batches: a short last group
        ({"max_steps": 7}, 7),  # max_steps alone, ending in the middle of an epoch
        ({"max_steps": 3, "accumulate_grad_batches": 2}, 3),
        ({"max_epochs": 3, "limit_train_batches": 2}, 6),
    ],
)
def test_equals_an_average_by_hand(tmp_path: Path, settings: dict, steps: int) -> None:
    model, shadow = small_model(momentum=0.9), Shadow(steps)
    trainer(tmp_path, callbacks=[shadow], **settings).fit(model, small_data())
    shadow.check(model, steps)


def test_second_fit_on_one_trainer_goes_on(tmp_path: Path) -> None:
    model, shadow = small_model(momentum=0.9), Shadow(6)
    run = trainer(tmp_path, callbacks=[shadow], max_epochs=1)
    run.fit(model, small_data())
    shadow.check(model, 6)
    shadow.total = 12
    run.fit_loop.max_epochs = 2
    run.fit(model, small_data())
    shadow.check(model, 12)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_resumed_run_goes_on_averaging(tmp_path: Path, accumulate: int) -> None:
    settings = {"max_epochs": 2, "accumulate_grad_batches": accumulate, "enable_checkpointing": True}
    save = ModelCheckpoint(tmp_path, filename="cut", every_n_train_steps=3)
    trainer(tmp_path, callbacks=[save], **settings | {"max_steps": 3}).fit(small_model(momentum=0.9), small_data())
    model, total = small_model(momentum=0.9), 12 // accumulate
    shadow = Shadow(total)
    trainer(tmp_path, callbacks=[shadow, ModelCheckpoint(tmp_path, every_n_train_steps=3)], **settings).fit(
        model, small_data(), ckpt_path=tmp_path / "cut.ckpt"
    )
    shadow.check(model, total)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_checkpoint_of_a_step_holds_the_target_of_that_step(tmp_path: Path, accumulate: int) -> None:
    class Record(Callback):
        targets: dict[int, dict[str, torch.Tensor]]

        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            self.targets = {}

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            # Before the next batch, everything that belongs to the last step has happened.
            self.targets.setdefault(trainer.global_step, copy.deepcopy(pl_module.target_encoder.state_dict()))

    record = Record()
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(
        tmp_path, callbacks=[record, save], enable_checkpointing=True, max_epochs=2, accumulate_grad_batches=accumulate
    )
    run.fit(small_model(), small_data())
    compared = 0
    for step, target in record.targets.items():
        if step == 0:
            continue
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["state_dict"]
        for name, value in target.items():
            assert torch.equal(saved[f"target_encoder.{name}"], value), (step, name)
        compared += 1
    assert compared == 12 // accumulate - 1


def test_target_is_a_frozen_copy_that_no_optimizer_knows(tmp_path: Path) -> None:
    model = small_model()
    for target, context in zip(model.target_encoder.parameters(), model.context_encoder.parameters(), strict=True):
        assert torch.equal(target, context)
        assert not target.requires_grad
    run = trainer(tmp_path, max_steps=1)
    run.fit(model, small_data())
    known = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert not known & {id(p) for p in model.target_encoder.parameters()}
    assert known == {id(p) for m in (model.context_encoder, model.predictor) for p in m.parameters()}
    model.train()
    assert not model.target_encoder.training and model.context_encoder.training


def test_buffers_are_copied_and_parameters_averaged() -> None:
    """Running statistics are averages already; an average of them would lag behind the weights that they belong to."""
    target, context = (torch.nn.BatchNorm1d(2) for _ in range(2))
    with torch.no_grad():
        for value, part in enumerate((*context.parameters(), *context.buffers()), start=3):
            part.fill_(value)
    update_average(target, context, 0.75)
    assert target.weight.tolist() == [1.5, 1.5] and target.bias.tolist() == [1.0, 1.0]
    assert target.running_mean.tolist() == [5.0, 5.0] and target.running_var.tolist() == [6.0, 6.0]
    assert target.num_batches_tracked == 7
    assert context.weight.tolist() == [3.0, 3.0], "the context is left alone"


def test_momentum_is_logged_and_reaches_neither_before_nor_after_its_end(tmp_path: Path) -> None:
    ema = EMAUpdate(0.9, 1.0)
    assert ema.momentum(0, 10) == 0.9
    assert ema.momentum(5, 10) == pytest.approx(0.95)
    assert ema.momentum(9, 10) < 1.0  # the last update still moves the target
    run = trainer(tmp_path, max_steps=1)
    run.fit(small_model(momentum=0.9), small_data())
    assert run.callback_metrics["train/momentum"].item() == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 1.1}, "momentum from 1.1"),
        ({"start": 0.9, "end": 0.8}, "momentum from 0.9 to 0.8"),
        ({"schedule": "stepwise"}, "schedule='stepwise'"),
        ({"start": 0.9, "schedule": "constant"}, "constant schedule"),
    ],
)
def test_impossible_momenta_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMAUpdate(**arguments)
