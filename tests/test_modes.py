"""The pendulum JEPA with actions: three target modes, and which way gradients and actions flow."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    parameters_equal,
    run_here,
    run_script,
    small_data,
    small_driven_data,
    small_driven_model,
    small_model,
    trainer,
)
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from callbacks import CollapseAlarm, CollapseWarning
from datamodules import ClipBatch
from jepa_lightning.weights.checkpoints import load_jepa

MODES = ("default", "vjepa2", "none")


def batch(count: int = 3, **changes: Any) -> ClipBatch:
    data = small_driven_data(size=max(count, 4), sequence_length=23, **changes)
    return data.observe(data.trajectories("train")[:count])


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


def awake(**changes: Any):
    """A model whose predictor's last layer is not zero, which would block gradients and actions."""
    model = small_driven_model(**changes)
    for parameter in model.predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_predictions_are_aligned_with_targets_and_actions(mode: str) -> None:
    """Fed the truth, the loss is zero, and each step is given the action that leads to it."""
    model, observed = small_driven_model(target_mode=mode), batch()
    features = model.encode(observed.observations)  # (B, T, D); context and target encoder are still the same
    known = {tuple(z.tolist()): (b, t) for b in range(3) for t, z in enumerate(features[b])}

    class Oracle(torch.nn.Module):
        def forward(self, z: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
            places = [known[tuple(row.tolist())] for row in z.flatten(0, -2)]
            given = actions.flatten(0, -2)
            assert torch.equal(given, torch.stack([observed.actions[b, t] for b, t in places]))
            return torch.stack([features[b, t + 1] for b, t in places]).view_as(z)

    model.predictor = Oracle()
    pairs = model.target_pairs(observed)
    assert pairs.targets.shape == (3, 5 - 2, 2, 8)
    torch.testing.assert_close(pairs.predictions, pairs.targets)


def test_an_action_does_not_influence_predictions_of_what_it_has_not_moved(mode: str) -> None:
    model, observed = awake(target_mode=mode), batch()
    actions = observed.actions.clone().requires_grad_()
    predictions = model.target_pairs(observed._replace(actions=actions)).predictions  # (B, S, H, D)
    for start in range(3):
        for step in range(2):
            (slope,) = torch.autograd.grad(predictions[:, start, step].sum(), actions, retain_graph=True)
            moved = slope.abs().sum(dim=(0, 2)) > 0  # by action
            assert moved.tolist() == [start <= t <= start + step for t in range(4)], (start, step)


@pytest.mark.parametrize(("name", "reached"), [("default", False), ("vjepa2", True), ("none", True)])
def test_gradient_of_the_prediction_loss_reaches_the_encoder(name: str, reached: bool) -> None:
    model = awake(target_mode=name)
    pairs = model.target_pairs(batch())
    model.prediction_loss(pairs).backward(retain_graph=True)
    assert all((p.grad is not None and p.grad.abs().sum() > 0) == reached for p in model.context_encoder.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.predictor.parameters())
    assert all(p.grad is None for p in model.target_encoder.parameters())
    assert not pairs.targets.requires_grad
    penalty, _ = model.regularizer(pairs.features)
    penalty.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.context_encoder.parameters())


def test_which_windows_the_regularizer_sees() -> None:
    seen = {name: small_driven_model(target_mode=name).target_pairs(batch()).features.shape[1] for name in MODES}
    assert seen == {"default": 5, "vjepa2": 3, "none": 5}


def test_the_target_encoder_stays_in_eval_mode(mode: str) -> None:
    model = small_driven_model(target_mode=mode).train()
    assert not any(module.training for module in model.target_encoder.modules()) and model.context_encoder.training


class Watch(Callback):
    """Target equal to context at the start, in eval mode while training; what the momentum was."""

    def __init__(self) -> None:
        self.momenta: list[float] = []

    def on_train_start(self, trainer, pl_module) -> None:
        if trainer.global_step == 0:
            assert parameters_equal(pl_module.target_encoder, pl_module.context_encoder)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        assert not any(module.training for module in pl_module.target_encoder.modules())
        assert pl_module.context_encoder.training and pl_module.predictor.training

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if "train/momentum" in trainer.callback_metrics:  # of the step before
            self.momenta.append(float(trainer.callback_metrics["train/momentum"]))


def test_trains_validates_saves_and_resumes_exactly(mode: str, tmp_path: Path) -> None:
    """Cut in the second epoch, after batch 3 of 6. With a regularizer that has a state, and one that draws."""

    def run(regularizer: str, ckpt_path: Path | None = None):
        model = small_driven_model(target_mode=mode, momentum=0.9, regularizer=regularizer, inverse_dynamics=0.5)
        folder = tmp_path / regularizer
        save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=9, save_top_k=-1)
        watch = Watch()
        settings = {"max_epochs": 3, "limit_val_batches": 1.0, "log_every_n_steps": 1, "callbacks": [watch, save]}
        fit = trainer(folder, enable_checkpointing=True, **settings)
        fit.fit(model, small_driven_data(), ckpt_path=ckpt_path)
        assert {"val/loss", "val/rankme", "val/linear_r2_omega2", "val/shuffled_over_true"} <= set(fit.callback_metrics)
        assert set(watch.momenta) == {0.0} if mode == "none" else min(watch.momenta) > 0.899
        return model

    for regularizer in ("dino_centering", "sigreg"):
        whole = run(regularizer)
        resumed = run(regularizer, ckpt_path=tmp_path / regularizer / "step=9.ckpt")
        assert parameters_equal(whole, resumed)
        assert parameters_equal(whole.target_encoder, whole.context_encoder) == (mode == "none")
        loaded = load_jepa(tmp_path / regularizer / "step=18.ckpt")
        assert loaded.target_mode == mode and parameters_equal(loaded.target_encoder, whole.target_encoder)


SCRIPT = """
import sys
from pathlib import Path
import torch
from conftest import small_driven_data, small_driven_model, trainer

out, devices, modes = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
torch.set_num_threads(1)
results = {mode: [] for mode in modes}
for mode in modes:
    for regularizer in ("vicreg", "sigreg", "subspace_sigreg", "barlow_twins", "dino_centering"):
        model = small_driven_model(target_mode=mode, momentum=0.9, regularizer=regularizer, inverse_dynamics=0.5)
        run = trainer(out, devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=1, limit_val_batches=1.0)
        run.fit(model, small_driven_data(batch_size=4 // devices, val_size=8))
        results[mode].append([model.state_dict(), {k: v for k, v in run.callback_metrics.items()}])
torch.save(results, out / f"rank{run.global_rank}.pt")
"""


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], ...]:
    """By mode, what one process alone has learned, and both of two."""
    folder = tmp_path_factory.mktemp("fitted")
    run_here(SCRIPT, folder / "one", "1", *MODES)
    run_script(SCRIPT, folder / "two", "2", *MODES)
    files = (folder / "one" / "rank0.pt", folder / "two" / "rank0.pt", folder / "two" / "rank1.pt")
    return tuple(torch.load(file, weights_only=True) for file in files)


def test_two_processes_equal_one_on_the_same_global_batch(mode: str, fitted: tuple[dict[str, Any], ...]) -> None:
    alone, first, second = (results[mode] for results in fitted)
    for (weights, figures), (weights0, figures0), (weights1, _) in zip(alone, first, second, strict=True):
        for name, value in weights.items():
            assert torch.equal(weights0[name], weights1[name]), f"ranks disagree on {name}"
            torch.testing.assert_close(weights0[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        for name in (name for name in figures if name.startswith("train/regularizer")):
            assert figures0[name].item() == pytest.approx(figures[name].item(), rel=1e-3, abs=1e-6), name


def test_inverse_dynamics_tells_actions_and_trains_the_encoder(tmp_path: Path) -> None:
    model = small_driven_model(
        inverse_dynamics=1.0, regularizer=None, learning_rate=1e-2, encoder_widths=(64,), predictor_width=64, latent_dim=16
    )
    data = small_driven_data(size=400, batch_size=40)
    errors = []

    class Record(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            errors.append(float(trainer.callback_metrics.get("train/inverse_dynamics", 1 / 3)))

    trainer(tmp_path, max_epochs=40, callbacks=[Record()], log_every_n_steps=1).fit(model, data)
    assert sum(errors[-10:]) < 0.7 * 10 / 3, "the variance of an action is 1 / 3"
    assert all(p.grad is not None for p in model.inverse_dynamics_model.parameters())


def collapsing(tmp_path: Path, **model: Any) -> list[str]:
    alarm = CollapseAlarm(grace_steps=250, action="stop")
    data = small_driven_data(size=200, val_size=16, batch_size=20)
    run = trainer(tmp_path, max_epochs=40, limit_val_batches=1.0, callbacks=[alarm], check_val_every_n_epoch=10)
    settings = {"latent_dim": 16, "predictor_width": 32, "encoder_widths": (64,), "learning_rate": 3e-3}
    run.fit(small_driven_model(**(settings | model)), data)
    return alarm.alarms


@pytest.mark.parametrize(
    "change",
    [
        {"regularizer": "dino_centering", "target_mode": "none"},
        {"regularizer": None, "target_mode": "none"},
        {"regularizer": None, "target_mode": "vjepa2", "momentum": 0.9},
    ],
)
def test_alarm_fires_without_a_working_regularizer(tmp_path: Path, change: dict) -> None:
    with pytest.warns(CollapseWarning, match="Collapse alarm at optimizer step"):
        assert len(collapsing(tmp_path, **change)) == 1


@pytest.mark.parametrize("mode", MODES)
def test_alarm_is_silent_with_vicreg(tmp_path: Path, mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CollapseWarning)
        assert collapsing(tmp_path, target_mode=mode, regularizer_weights={"covariance": 0.2, "curvature": 0.0}) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_mode": "byol"}, "model.target_mode='byol': choose one of default, vjepa2, none"),
        ({"target_mode": "default", "regularizer": None}, "nothing would train the encoder"),
        ({"regularizer": "barlow"}, "model.regularizer='barlow': choose one of"),
        ({"predictor_dropout": 1.0}, "model.predictor_dropout=1.0"),
        ({"action_dim": -1}, "model.action_dim=-1"),
        ({"action_dim": 0, "inverse_dynamics": 1.0}, "needs actions to predict"),
        ({"encoder": "resnet"}, "model.encoder='resnet': choose one of cnn, mlp, vit"),
        ({"encoder": "vit"}, "reads images, and there are only vectors"),
        ({"encoder": "vit", "observation": "pixels", "encoder_widths": (32, 64)}, "all of one width"),
        ({"encoder": "vit", "observation": "pixels", "encoder_widths": (32,), "image_size": 36}, "patches of 8 pixels"),
        ({"encoder_widths": ()}, r"model.encoder_widths=\(\)"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_driven_model(**change)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({"action_dim": 3}, {}, "model.action_dim=3, but the data's actions have 2 scalars"),
        ({}, {"torque_limits": None}, "model.action_dim=2, but the data's actions have 0 scalars"),
        ({"horizon": 5}, {}, r"model.horizon=5 .* data.clip_length=23 frames: lower the horizon to at most 4"),
        ({"horizon": 4, "inverse_dynamics": 1.0, "regularizer": None}, {}, "inverse_dynamics compares 2 windows"),
        (
            {"horizon": 4, "regularizer": "barlow_twins"},
            {},
            "the context encoder sees 1: lengthen .* by 5 frames",
        ),
        ({"horizon": 3}, {}, "regularizer 'vicreg' compares 3 windows"),
    ],
)
def test_model_and_data_that_do_not_fit_are_refused(tmp_path: Path, model: dict, data: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, max_steps=1).fit(small_driven_model(**model), small_driven_data(**data))


def test_a_free_model_refuses_actuated_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model.action_dim=0, but the data's actions have 2 scalars"):
        trainer(tmp_path, max_steps=1).fit(small_model(), small_data(torque_limits=(1.0, 1.0)))


def test_data_of_another_step_is_refused_on_resume(tmp_path: Path) -> None:
    """Lightning reads the checkpoint after `setup`."""
    run = trainer(tmp_path, max_steps=1)
    run.fit(small_driven_model(), small_driven_data())
    run.save_checkpoint(tmp_path / "jepa.ckpt")
    for subcommand in ("fit", "validate"):
        with pytest.raises(ValueError, match="trained on data.stride=5, and now data.stride=1"):
            getattr(trainer(tmp_path, max_steps=2, limit_val_batches=1.0), subcommand)(
                small_driven_model(), datamodule=small_driven_data(stride=1), ckpt_path=tmp_path / "jepa.ckpt"
            )


def test_a_batch_without_the_actions_that_are_needed_is_refused() -> None:
    with pytest.raises(ValueError, match="action_dim=2 needs actions of that many scalars; the batch has none"):
        small_driven_model().target_pairs(batch()._replace(actions=None))
    with pytest.raises(ValueError, match="action_dim=0 needs .* some of 2 scalars"):
        small_driven_model(action_dim=0).target_pairs(batch())
