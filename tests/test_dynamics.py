"""The world model of any environment: observations and actions of every kind, and the guarantees of all models."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import (
    parameters_equal,
    record_points,
    run_here,
    run_script,
    small_dynamics,
    small_images,
    small_trajectories,
    trainer,
)
from torch.utils.data import DataLoader

from callbacks import CollapseAlarm, LastCheckpoint
from callbacks.collapse import CollapseWarning
from datamodules.recordings import Episode, write_episode
from jepa_lightning import DynamicsJEPA, Planner, load
from jepa_lightning.cli import main
from jepa_lightning.dynamics_checks import check_observations, sizes_of
from jepa_lightning.metrics import RidgeR2
from jepa_lightning.networks.predictor import PrefixPredictor, ResidualPredictor


def test_sizes_are_those_of_the_data(points_root: Path) -> None:
    model = small_dynamics(small_trajectories(points_root, stride=2, history=2, channels=1, observation="both"))
    assert (model.image_size, model.channels, model.history, model.observation) == (16, 1, 2, "both")
    assert (model.action_dim, model.num_choices, model.vector_dim) == (4, 0, 2)


@pytest.mark.parametrize("observation", ["pixels", "vectors", "both"])
def test_what_is_observed_is_learned_from(points_root: Path, tmp_path: Path, observation: Any) -> None:
    data = small_trajectories(points_root, observation=observation, history=2)
    model = small_dynamics(data)
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=1.0)
    before = {name: value.clone() for name, value in model.context_encoder.named_parameters()}
    run.fit(model, data)
    for name, value in model.context_encoder.named_parameters():
        assert not torch.equal(value, before[name]), f"{name} is not learned"
    assert {"val/linear_r2_observation.0", "val/shuffled_over_true"} <= run.callback_metrics.keys()
    batch = data.first_clips(3, torch.device("cpu"))
    features = model.encode_batch(batch)
    assert features.shape == (3, 5, 8)
    if observation == "both":
        other = model.encode(batch.observations, batch.vectors + 1)
        assert not torch.allclose(features, other) and not torch.allclose(
            features, model.encode(1 - batch.observations, batch.vectors)
        )


def test_the_predictor_is_the_one_that_was_asked_for(points_root: Path) -> None:
    data = small_trajectories(points_root)
    assert type(small_dynamics(data).predictor) is ResidualPredictor
    model = small_dynamics(data, predictor="prefix", predictor_width=32, predictor_dropout=0.25, horizon=2)
    predictor = model.predictor
    assert type(predictor) is PrefixPredictor and predictor.length == 2 and predictor.change.in_features == 32
    assert all(block.dropout.p == 0.25 for block in predictor.blocks)
    assert model.plan(torch.zeros(2, 3, 16, 16), torch.ones(2, 3, 16, 16), horizon=5).shape == (2, 5, 2)


def test_a_plan_of_a_model_that_observes_both_looks_at_both(points_root: Path) -> None:
    data = small_trajectories(points_root, observation="both")
    model = small_dynamics(data).eval()
    torch.nn.init.normal_(model.predictor.change[-1].weight, std=0.1)
    batch = data.first_clips(4, torch.device("cpu"))
    windows, vectors = batch.observations, batch.vectors
    planner = Planner(num_samples=32, num_iterations=3, num_elites=4)

    def plan(start_vectors: Any, goal_vectors: Any) -> torch.Tensor:
        return model.plan(windows[:, 0], windows[:, 2], 2, planner, vectors=start_vectors, goal_vectors=goal_vectors)

    found = plan(vectors[:, 0], vectors[:, 2])
    assert found.shape == (4, 2, 2) and torch.equal(found, plan(vectors[:, 0], vectors[:, 2]))
    assert not torch.equal(found, plan(vectors[:, 0], vectors[:, 2] + 10))
    assert not torch.equal(found, plan(vectors[:, 0] + 10, vectors[:, 2]))


def test_images_need_not_be_square(tmp_path: Path) -> None:
    for number in range(4):
        frames = np.random.default_rng(number).integers(0, 255, (9, 16, 32, 3), np.uint8)
        write_episode(tmp_path / "wide", Episode(f"{number}.npz", np.random.rand(8, 1), frames))
    data = small_trajectories(tmp_path / "wide")
    for encoder in ("cnn", "vit", "mlp"):
        model = small_dynamics(data, encoder=encoder, encoder_widths=(32,) if encoder != "cnn" else (4, 8))
        assert model.image_size == (16, 32)
        trainer(tmp_path, max_steps=1).fit(model, data)
    with pytest.raises(ValueError, match=r"model.image_size=\[16, 38\] is too small or not divisible"):
        DynamicsJEPA(image_size=(16, 38), encoder_widths=(4,))


def test_discrete_actions_are_learned_from_planned_with_and_told_apart(tmp_path: Path) -> None:
    data = small_trajectories(record_points(tmp_path / "discrete", choices=True), stride=2)
    model = small_dynamics(data, inverse_dynamics=0.1)
    assert (model.action_dim, model.num_choices) == (10, 5)
    trainer(tmp_path, max_steps=2, limit_val_batches=1.0).fit(model, data)
    batch = data.first_clips(2, torch.device("cpu"))
    plan = model.eval().plan(batch.observations[:, 0], batch.observations[:, 3], 3, Planner(num_samples=16, num_elites=4))
    assert torch.equal(plan.unflatten(-1, (2, 5)).sum(-1), torch.ones(2, 3, 2)) and set(plan.unique().tolist()) == {0.0, 1.0}


def test_states_of_any_width_are_probed_and_none_are_needed(tmp_path: Path, points_root: Path) -> None:
    data = small_trajectories(points_root)
    model = small_dynamics(data)
    batch = data.first_clips(4, torch.device("cpu"))
    loader = DataLoader([batch._replace(states=None)] * 2, batch_size=None)  # type: ignore[arg-type]
    run = trainer(tmp_path, limit_val_batches=1.0)
    run.validate(model, loader, verbose=False)
    assert not any("linear_r2" in name for name in run.callback_metrics) and "val/loss" in run.callback_metrics
    wide = torch.cat([batch.states, batch.states[..., :1] * 2], dim=-1)
    named = {"pixels": batch.observations, "action": batch.actions, "states": wide}
    run.validate(model, DataLoader([named] * 2, batch_size=None), verbose=False)
    assert {f"val/linear_r2_{k}" for k in range(3)} <= run.callback_metrics.keys()


def test_the_probe_of_the_state_is_fitted_and_evaluated_on_different_episodes(tmp_path: Path, points_root: Path) -> None:
    data = small_trajectories(points_root, windows=3, val_fraction=0.4, batch_size=3)
    model = small_dynamics(data, horizon=1, regularizer="variance_hinge")
    seen: dict[bool, set[float]] = {True: set(), False: set()}

    class Watching(RidgeR2):
        def update(self, features: torch.Tensor, labels: torch.Tensor, fit: bool) -> None:
            seen[fit] |= set(labels[:, 0].tolist())
            super().update(features, labels, fit)

    model.probe = Watching(model.latent_dim, 2)
    trainer(tmp_path, limit_val_batches=1.0).validate(model, datamodule=data, verbose=False)
    store = data.store
    for fit in (True, False):
        mine = [e for k, e in enumerate(data.episodes("val")) if (k % 2 == 0) == fit]
        rows = torch.cat([store.table[store.episode(e), store.column("states")][:, 0] for e in mine])
        assert seen[fit] and seen[fit] <= set(rows.tolist())


def test_with_a_single_held_out_episode_nothing_can_be_evaluated(tmp_path: Path, points_root: Path) -> None:
    data = small_trajectories(points_root, val_fraction=0.05)
    run = trainer(tmp_path, limit_val_batches=1.0)
    run.validate(small_dynamics(data), datamodule=data, verbose=False)
    assert run.callback_metrics["val/linear_r2_observation.0"].isnan() and run.callback_metrics["val/loss"].isfinite()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"observation": "vectors"}, "model.vector_dim=0 with observation='vectors'"),
        ({"observation": "coordinates"}, "model.observation='coordinates'"),
        ({"num_choices": 1, "action_dim": 2}, "model.num_choices=1"),
        ({"num_choices": 3, "action_dim": 4}, "model.num_choices=3 with action_dim=4"),
        ({"num_choices": 3}, "model.num_choices=3 with action_dim=0"),
        ({"image_size": (0, 8)}, r"model.image_size=\(0, 8\)"),
        ({"predictor": "mlp"}, "model.predictor='mlp': choose one of residual, prefix"),
        (
            {"predictor": "prefix", "predictor_width": 80},
            "model.predictor_width=80 with predictor='prefix': give a multiple",
        ),
    ],
)
def test_wrong_arguments_are_refused(changes: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DynamicsJEPA(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"action_dim": 3}, "model.action_dim=3, but the data's actions have 2 scalars: set model.action_dim to 2"),
        ({"history": 2}, "The model has history=2 but data.history=1"),
        ({"image_size": 32}, "The model has image_size=32 but data.image_size=16"),
        ({"horizon": 5}, "lower the horizon to at most 4 or lengthen data.windows"),
    ],
)
def test_a_model_of_other_data_is_refused_before_anything_runs(
    tmp_path: Path, points_root: Path, changes: Any, said: str
) -> None:
    data = small_trajectories(points_root)
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, max_steps=1).fit(small_dynamics(data, **changes), data)


def test_sizes_are_compared_as_sizes_and_images_say_none(points_root: Path) -> None:
    data = small_trajectories(points_root)
    model = small_dynamics(data)
    for image_size in (16, (16, 16), [16, 16]):
        model.image_size = image_size
        check_observations(model, data)
    model.image_size = (16, 17)
    with pytest.raises(ValueError, match=r"The model has image_size=\(16, 17\) but data.image_size=16"):
        check_observations(model, data)
    assert sizes_of(data)["image_size"] == 16
    assert sizes_of(small_images(points_root)) == {}, "they have an image_size, too, and are no clips"


def test_a_checkpoint_refuses_other_dynamics_and_is_loaded(tmp_path: Path, points_root: Path) -> None:
    data = small_trajectories(points_root)
    model = small_dynamics(data)
    run = trainer(tmp_path, max_steps=2, enable_checkpointing=True, callbacks=[LastCheckpoint()])
    run.fit(model, data)
    found = load(tmp_path / "checkpoints" / "last.ckpt")
    assert type(found) is DynamicsJEPA and parameters_equal(found, model.eval())
    assert found.trained_on["id"] == "points:Points" and found.trained_on["stride"] == 1
    with pytest.raises(ValueError, match="The model was trained on data.stride=1, and now data.stride=2"):
        found.action_dim = 4
        trainer(tmp_path).validate(found, datamodule=small_trajectories(points_root, stride=2), verbose=False)


def test_the_command_line_builds_for_the_data_and_tells_the_checkpoint(tmp_path: Path, points_root: Path) -> None:
    small = ["--model.encoder_widths", "[4]", "--model.horizon", "2", "--model.latent_dim", "8", "--data.windows", "5"]
    run = [
        "--trainer.default_root_dir",
        str(tmp_path),
        "--trainer.accelerator",
        "cpu",
        "--trainer.enable_progress_bar",
        "false",
    ]
    data = ["--data", "Trajectories", "--data.root", str(points_root), "--data.batch_size", "2", "--data.history", "2"]
    main(["fit", "--model", "DynamicsJEPA", *data, *small, "--data.channels", "1", "--trainer.max_steps", "2", *run])
    model = load(tmp_path)
    assert (model.image_size, model.channels, model.history, model.action_dim) == (16, 1, 2, 2)
    assert "action_dim: 2" in (tmp_path / "config.yaml").read_text()
    main(["validate", "--ckpt_path", str(tmp_path), *run[2:]])


class Cut(pl.Callback):
    """Stops in the middle of an epoch."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("num_workers", "changes"),
    [(0, {}), (1, {}), (0, {"predictor": "prefix", "predictor_width": 32, "regularizer": "subspace_sigreg"})],
)
def test_a_run_that_was_cut_goes_on_bit_for_bit(tmp_path: Path, points_root: Path, num_workers: int, changes: Any) -> None:
    def fit(out: Path, *callbacks: Any, path: str | None = None) -> DynamicsJEPA:
        data = small_trajectories(points_root, num_workers=num_workers)
        model = small_dynamics(data, momentum=0.9, **changes)
        last = LastCheckpoint(every_n_train_steps=1)
        run = trainer(out, max_epochs=3, enable_checkpointing=True, callbacks=[last, *callbacks])
        run.fit(model, data, ckpt_path=path)
        return model

    uncut = fit(tmp_path / "uncut")
    with pytest.raises(SystemExit):
        fit(tmp_path / "cut", Cut())
    resumed = fit(tmp_path / "cut", path=str(tmp_path / "cut" / "checkpoints" / "last.ckpt"))
    assert parameters_equal(uncut, resumed)


def test_the_target_follows_by_the_moving_average(tmp_path: Path, points_root: Path) -> None:
    data = small_trajectories(points_root)
    model = small_dynamics(data, momentum=0.5, final_momentum=0.5)
    before = {name: value.clone() for name, value in model.target_encoder.named_parameters()}
    trainer(tmp_path, max_steps=1).fit(model, data)
    for name, value in model.target_encoder.named_parameters():
        torch.testing.assert_close(value, (before[name] + model.context_encoder.get_parameter(name)) / 2)


def test_the_alarm_sees_a_collapse(tmp_path: Path, points_root: Path) -> None:
    data = small_trajectories(points_root)
    model = small_dynamics(data)
    for encoder in (model.context_encoder, model.target_encoder):
        torch.nn.init.zeros_(encoder.layers[-1].weight)
    alarm = CollapseAlarm(grace_steps=0)
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=1.0, callbacks=[alarm])
    with pytest.warns(CollapseWarning, match="all inputs look alike"):
        run.fit(model, data)


SCRIPT = """
import sys
from pathlib import Path
import torch
from conftest import small_dynamics, small_trajectories, trainer
out, root, devices = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
data = small_trajectories(root, batch_size=4 // devices)
model = small_dynamics(data, momentum=0.9)
run = trainer(out, devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=2, limit_val_batches=1.0)
run.fit(model, data)
torch.save(model.state_dict(), out / f"rank{run.global_rank}.pt")
"""


def test_two_processes_equal_one(tmp_path: Path, points_root: Path) -> None:
    run_here(SCRIPT, tmp_path / "1", str(points_root), "1")
    run_script(SCRIPT, tmp_path / "2", str(points_root), "2")
    alone, first, second = (
        torch.load(tmp_path / name, weights_only=True) for name in ("1/rank0.pt", "2/rank0.pt", "2/rank1.pt")
    )
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), f"ranks disagree on {name}"
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)
