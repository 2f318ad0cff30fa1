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
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision

from callbacks import EMAUpdate
from callbacks.ema import update_average, wide_copy
from callbacks.schedules import cosine, warmup_cosine


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


class SaveInMidStep(Callback):
    """Save between the optimizer's step and the end of the batch, as a signal's handler may."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
        counted = progress.increment_completed

        def increment_completed() -> None:
            counted()
            if trainer.global_step == self.step and not self.path.exists():
                trainer.save_checkpoint(self.path)

        progress.increment_completed = increment_completed


@pytest.mark.parametrize("accumulate", [1, 3])
def test_checkpoint_written_in_mid_step_loses_no_update_and_repeats_none(tmp_path: Path, accumulate: int) -> None:
    class Record(Callback):
        target = None

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if self.target is not None:
                return
            self.target = {f"target_encoder.{key}": v.clone() for key, v in pl_module.target_encoder.state_dict().items()}
            self.rate = trainer.optimizers[0].param_groups[0]["lr"]
            self.weight_decay = pl_module._weight_decay_schedule.steps

    settings: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": accumulate}
    path, step, record = tmp_path / "cut.ckpt", 3, Record()
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = settings | {"enable_checkpointing": True, "callbacks": [SaveInMidStep(path, step), save]}
    trainer(tmp_path, **whole).fit(small_model(momentum=0.9), small_data())
    trainer(tmp_path, callbacks=[record], **settings).fit(small_model(momentum=0.9), small_data(), ckpt_path=path)

    cut, expected = (torch.load(file, weights_only=True) for file in (path, tmp_path / f"step={step}.ckpt"))
    assert cut["global_step"] == expected["global_step"] == step
    assert any(not torch.equal(cut["state_dict"][name], expected["state_dict"][name]) for name in record.target)
    for name, value in record.target.items():
        assert torch.equal(value, expected["state_dict"][name]), name
    assert record.rate == expected["optimizer_states"][0]["param_groups"][0]["lr"]
    assert record.weight_decay == step


def test_checkpoint_without_a_count_of_steps_is_resumed(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="cut", every_n_train_steps=5)
    trainer(tmp_path, callbacks=[save], enable_checkpointing=True, max_steps=5).fit(small_model(momentum=0.9), small_data())
    old = torch.load(tmp_path / "cut.ckpt", weights_only=True)
    del old["callbacks"]["EMAUpdate"], old["callbacks"]["WeightDecaySchedule"], old["lr_schedulers"][0]["stepped"]
    torch.save(old, tmp_path / "old.ckpt")
    model, shadow = small_model(momentum=0.9), Shadow(12)
    trainer(tmp_path, callbacks=[shadow], max_epochs=2).fit(model, small_data(), ckpt_path=tmp_path / "old.ckpt")
    shadow.check(model, 12)


def test_a_module_that_was_trained_before_starts_anew_with_another_trainer(tmp_path: Path) -> None:
    model, shadow = small_model(momentum=0.9), Shadow(5)
    trainer(tmp_path, max_steps=3).fit(model, small_data())
    trainer(tmp_path, callbacks=[shadow], max_steps=5).fit(model, small_data())
    shadow.check(model, 5)


def test_steps_that_a_gradient_scaler_leaves_out_move_nothing(tmp_path: Path) -> None:
    class Overflow(Callback):
        """Makes the gradients of some steps infinite, as float16 does, and records what the schedules made of it."""

        def __init__(self, steps: set[int]) -> None:
            self.steps, self.rates, self.decays = steps, [], []

        def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
            if trainer.global_step in self.steps:
                next(pl_module.context_encoder.parameters()).grad.fill_(torch.inf)
            group = trainer.optimizers[0].param_groups[0]
            self.rates.append(group["lr"])
            self.decays.append(group["weight_decay"])

    model, shadow, overflow = small_model(momentum=0.9, final_weight_decay=0.1), Shadow(12), Overflow({0, 4, 5})
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    run = trainer(tmp_path, callbacks=[shadow, overflow], max_epochs=2, plugins=MixedPrecision("16-mixed", "cpu", scaler))
    run.fit(model, small_data())
    assert run.global_step == 12
    shadow.check(model, 9)
    taken = [0, 0, 1, 2, 3, 3, 3, 4, 5, 6, 7, 8]  # optimizer steps before each batch
    assert overflow.rates == [model.learning_rate * warmup_cosine(step, 12, 0, 0.01) for step in taken]
    assert overflow.decays == [cosine(step, 12, model.weight_decay, 0.1) for step in taken]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_average_of_narrow_networks_follows_one_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    target, context = torch.nn.Linear(16, 16).to(dtype), torch.nn.Linear(16, 16).to(dtype)
    exact = [p.detach().double() for p in target.parameters()]
    average = wide_copy(target, {})
    for _ in range(2000):
        update_average(target, context, 0.996, average)
        exact = [e.lerp(c.detach().double(), 1 - 0.996) for e, c in zip(exact, context.parameters(), strict=True)]
    for value, reference, rounded in zip(average.values(), exact, target.parameters(), strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=0, atol=1e-3)
        assert torch.equal(rounded, value.to(dtype))


@pytest.mark.parametrize("precision", ["bf16-true"])
def test_average_is_kept_in_float32_and_resumed_exactly(tmp_path: Path, precision: str) -> None:
    settings = {"max_epochs": 2, "enable_checkpointing": True, "precision": precision}
    models = []
    for path in (None, tmp_path / "step=5.ckpt"):
        save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        models.append(small_model(momentum=0.999, learning_rate=1e-3))
        trainer(tmp_path, callbacks=[save], **settings).fit(models[-1], small_data(), ckpt_path=path)
    uncut, resumed = models
    assert all(p.dtype == HalfPrecision(precision)._desired_input_dtype for p in uncut.parameters())
    for name, value in uncut.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for name, value in uncut._ema._average.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, resumed._ema._average[name]), name
        saved = torch.load(tmp_path / "step=12.ckpt", weights_only=True)["state_dict"][f"target_encoder.{name}"]
        assert torch.equal(value, saved), name


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
