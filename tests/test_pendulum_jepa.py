"""The pendulum JEPA: what predicts what, and which way gradients flow. The mistakes of earlier systems, one test each."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import small_data, small_model, trainer

from datamodules import ClipBatch
from datamodules.physics import state_labels
from jepa_lightning.finite import NonFiniteError
from jepa_lightning.jepa import TargetPairs
from jepa_lightning.losses import squared_error, step_weights
from jepa_lightning.pendulum import PendulumJEPA
from jepa_lightning.rollouts import later_features, unroll


def batch(model: PendulumJEPA, count: int = 3, frames: int = 8) -> ClipBatch:
    data = small_data(size=count, sequence_length=frames, observation=model.observation, image_size=32, clip_length=frames)
    return data.observe(data.trajectories("train"))


def small_pixels(**changes) -> PendulumJEPA:
    return small_model(observation="pixels", image_size=32, encoder_widths=(4, 8), **changes)


def test_unroll_applies_the_predictor_to_its_own_output() -> None:
    start = torch.arange(6.0).view(2, 3)
    steps = unroll(lambda z: 2 * z + 1, start, 3)
    assert torch.equal(steps, torch.stack([2 * start + 1, 4 * start + 3, 8 * start + 7], dim=1))


def test_later_embeddings_of_each_start() -> None:
    features = torch.arange(6.0).view(1, 6, 1)
    assert later_features(features, 3)[0, :, :, 0].tolist() == [[1, 2, 3], [2, 3, 4], [3, 4, 5]]


@pytest.mark.parametrize("build", [small_model, small_pixels])
def test_predictions_are_aligned_with_their_targets(build) -> None:
    """Fed the truth, the loss is zero: no frame is off by one, and the last frames are used."""
    model = build()
    observed = batch(model)
    target = model.encode(observed.observations)  # (B, T, D)
    known = {tuple(z.tolist()): (b, t) for b in range(3) for t, z in enumerate(target[b])}

    class Oracle(torch.nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            places = [known[tuple(row.tolist())] for row in z.flatten(0, -2)]
            return torch.stack([target[b, t + 1] for b, t in places]).view_as(z)

    model.predictor = Oracle()
    pairs = model.target_pairs(observed)
    assert pairs.targets.shape == (3, 7 - 4, 4, 8)
    assert torch.equal(pairs.predictions, pairs.targets)
    assert torch.equal(pairs.targets[:, -1, -1], target[:, -1])


@pytest.mark.parametrize("build", [small_model, small_pixels])
def test_prediction_loss_reaches_encoder_and_predictor_but_not_the_target(build) -> None:
    """One earlier system's default mode gave its online encoder no gradient at all."""
    model = build()
    for parameter in model.predictor.parameters():  # its last layer starts at zero and blocks what is below it
        torch.nn.init.normal_(parameter, std=0.1)
    pairs = model.target_pairs(batch(model))
    model.prediction_loss(pairs).backward()
    for module in (model.context_encoder, model.predictor):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert all(p.grad is None for p in model.target_encoder.parameters())


def test_regularizer_acts_on_the_context_encoder_output() -> None:
    """Earlier systems regularized predictions and no-grad targets, which the encoder does not feel."""
    model = small_model()
    pairs = model.target_pairs(batch(model))
    penalty, _ = model.regularizer(pairs.features)
    penalty.backward()
    assert all(p.grad is not None for p in model.context_encoder.parameters())
    assert all(p.grad is None for p in model.predictor.parameters())


def test_untrained_predictor_says_that_nothing_changes() -> None:
    model = small_model()
    features = torch.randn(5, 8)
    assert torch.equal(model.forecast(features, 3), features[:, None].expand(-1, 3, -1))


def test_targets_have_no_gradient_or_the_loss_objects() -> None:
    with pytest.raises(AssertionError):
        squared_error(torch.zeros(2, 3), torch.zeros(2, 3, requires_grad=True))


def test_near_steps_weigh_more() -> None:
    torch.testing.assert_close(step_weights(4, 1.0), torch.tensor([1, 1 / 2, 1 / 3, 1 / 4]) * 48 / 25)
    assert step_weights(3, 0.0).tolist() == [1, 1, 1]
    error = torch.randn(5, 2, 4, 8)  # (B, S, H, D)
    weighted = sum(error[:, :, k].square().mean() * w for k, w in enumerate([1, 1 / 2, 1 / 3, 1 / 4])) / 4 * 48 / 25
    pairs = TargetPairs(error, torch.zeros_like(error), error, error)
    torch.testing.assert_close(small_model(step_decay=1.0).prediction_loss(pairs), weighted)
    torch.testing.assert_close(small_model(step_decay=0.0).prediction_loss(pairs), error.square().mean())


def test_training_minimizes_the_weighted_loss(tmp_path: Path) -> None:
    logged = []
    for decay in (0.0, 3.0):
        model = small_model(step_decay=decay)
        for parameter in model.predictor.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # so that errors grow along the horizon
        run = trainer(tmp_path, max_steps=1, log_every_n_steps=1)
        run.fit(model, small_data())
        logged.append(run.callback_metrics["train/prediction_loss"])
    assert logged[1] < 0.9 * logged[0]


def test_each_sample_has_a_start_of_its_own() -> None:
    """An earlier system drew one start per batch."""
    data = small_data(size=64, sequence_length=30, clip_length=8, batch_size=64)
    clips = next(iter(data.train_dataloader())).view(torch.float32)
    order = [i for b in data.train_dataloader().sampler for _, i in b]
    starts = (data.trajectories("train")[order] == clips[:, :1]).all(-1).int().argmax(1)
    assert len(set(starts.tolist())) > 15


def test_the_online_probe_is_evaluated_on_trajectories_that_it_was_not_fitted_on() -> None:
    model = small_model()
    model.log = model.log_dict = lambda *_, **__: None
    model._trainer = SimpleNamespace(sanity_checking=False)
    observed = batch(model, count=5)
    pairs = model.validation_step(observed, 1)
    labels = state_labels(observed.states)
    expected = type(model.probe)(model.probe.dim, labels.shape[-1])
    for rows, fit in (([0, 2, 4], True), ([1, 3], False)):
        expected.update(pairs.target_features[rows].flatten(0, 1), labels[rows].flatten(0, 1), fit=fit)
    torch.testing.assert_close(model.probe.fit_moments, expected.fit_moments)
    torch.testing.assert_close(model.probe.test_moments, expected.test_moments)


def test_labels_are_sines_cosines_and_velocities() -> None:
    labels = state_labels(torch.tensor([[0.0, torch.pi / 2, 3.0, -4.0]]))
    torch.testing.assert_close(labels, torch.tensor([[0.0, 1.0, 1.0, 0.0, 3.0, -4.0]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("build", [small_model, small_pixels])
def test_loss_falls(tmp_path: Path, build) -> None:
    model = build(regularizer_weights={"curvature": 0.0}, learning_rate=3e-3)
    data = small_data(size=64, observation=model.observation, image_size=32, batch_size=16)
    losses = []
    model.on_train_batch_end = lambda outputs, *_: losses.append(outputs["loss"].item())
    trainer(tmp_path, max_epochs=15).fit(model, data)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_validation_reports_what_a_person_watches(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=1.0, log_every_n_steps=1)
    run.fit(small_model(), small_data())
    expected = {
        "train/loss", "train/prediction_loss", "train/regularizer_variance", "train/momentum",
        "train/gradient_norm_encoder", "train/gradient_norm_predictor",
        "val/loss", "val/feature_std", "val/rankme", "val/participation_ratio", "val/largest_eigenvalue_share",
        "val/context_feature_std", "val/persistence_ratio", "val/persistence_ratio_first",
        "val/linear_r2_sin_theta1", "val/linear_r2_omega2",
    }  # fmt: skip
    assert expected <= set(run.callback_metrics)


def test_optimizer_groups_and_schedule(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=20)
    model = small_model(weight_decay=0.1, final_weight_decay=0.3, learning_rate=1e-3, warmup_fraction=0.5)
    run.fit(model, small_data())
    decay, no_decay = run.optimizers[0].param_groups
    assert all(p.ndim > 1 for p in decay["params"]) and all(p.ndim <= 1 for p in no_decay["params"])
    assert no_decay["weight_decay"] == 0
    assert decay["weight_decay"] == pytest.approx(0.3, abs=0.01)  # the cosine's end, at the last step
    assert decay["lr"] == pytest.approx(0, abs=1e-6)


def test_nan_stops_the_run_before_the_weights_see_it(tmp_path: Path) -> None:
    class Poison(torch.nn.Module):
        calls = 0

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return z * (torch.nan if self.calls > 4 * 5 else 1.0)

    from callbacks import LastCheckpoint

    model = small_model()
    model.predictor = torch.nn.Sequential(model.predictor, Poison())
    run = trainer(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[LastCheckpoint(1)])
    with pytest.raises(NonFiniteError, match="optimizer step 5"):
        run.fit(model, small_data())
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 5
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"horizon": 0}, "model.horizon=0"),
        ({"latent_dim": 0}, "model.latent_dim=0"),
        ({"learning_rate": 0.0}, "model.learning_rate=0.0"),
        ({"step_decay": -1.0}, "model.step_decay=-1.0"),
        ({"warmup_fraction": 1.0}, "model.warmup_fraction=1.0"),
        ({"observation": "sound"}, "model.observation='sound'"),
        ({"observation": "pixels", "image_size": 16, "encoder_widths": (4, 4, 4)}, "model.image_size=16 is too small"),
        ({"observation": "pixels", "image_size": 36, "encoder_widths": (4, 4)}, "multiple of 8"),
        ({"momentum": 2.0}, "momentum from 2.0"),
        ({"weight_decay": -1.0}, "weight decay from -1.0"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(**change)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({"horizon": 7}, {}, r"model.horizon=7 .* data.clip_length=8 .* at most 6"),
        ({"history": 3}, {}, "history=3 but data.history=2"),
        ({}, {"observation": "pixels", "image_size": 32}, "observation=coordinates but data.observation=pixels"),
    ],
)
def test_model_and_data_that_do_not_fit_are_refused_before_training(
    tmp_path: Path, model: dict, data: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, max_steps=1).fit(small_model(**model), small_data(**data))


def test_a_batch_shorter_than_the_horizon_is_refused() -> None:
    model = small_model(horizon=7)
    with pytest.raises(ValueError, match="horizon=7 needs clips of more than 7 windows; the batch has 7"):
        model.target_pairs(batch(model))


def test_predict_gives_the_embeddings_of_the_target_encoder(tmp_path: Path) -> None:
    model, data = small_model(), small_data(test_sequence_length=9)
    (features,) = trainer(tmp_path).predict(model, data)
    expected = model.encode(data.observe(data.trajectories("test")).observations)
    assert features.shape == (3, 8, 8) and torch.equal(features, expected)


def test_bfloat16_trains(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        run = trainer(tmp_path, max_epochs=1, limit_val_batches=1.0, precision="bf16-mixed")
    run.fit(small_pixels(), small_data(observation="pixels", image_size=32))
    assert torch.isfinite(run.callback_metrics["train/loss"]) and torch.isfinite(run.callback_metrics["val/rankme"])
