"""The encoder-decoders: what they learn from, and that they are world models like all others."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import parameters_equal, small_trajectories, trainer
from lightning.pytorch import seed_everything
from test_dynamics import Cut

from callbacks import LastCheckpoint
from datamodules import Trajectories
from jepa_lightning import EncoderDecoder, Planner, load, start_from
from jepa_lightning.cli import main
from jepa_lightning.probes import GoalProbe, ImageDecoder, InverseModel

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "encoder_widths": (4,),
    "latent_dim": 8,
    "predictor_width": 16,
    "horizon": 2,
    "learning_rate": 1e-3,
    "decoder_width": 32,
    "decoder_depth": 1,
}
FAST = Planner(num_samples=32, num_iterations=2, num_further_iterations=2, num_elites=4)


def small_encoder_decoder(data: Trajectories, awake: bool = False, **changes: Any) -> EncoderDecoder:
    """A small model; `awake`, its predictor does not say that nothing changes."""
    torch.manual_seed(0)
    model = EncoderDecoder.for_data(data, **(SMALL | changes))
    if awake:
        torch.nn.init.normal_(model.predictor.change[-1].weight, std=0.3)
    return model


def saved(root: Path, data: Trajectories, steps: int = 2, **changes: Any) -> str:
    """The path of a checkpoint of a small model that was trained for a few steps."""
    model = small_encoder_decoder(data, awake=True, **changes)
    trainer(root, max_steps=steps, enable_checkpointing=True, callbacks=[LastCheckpoint()]).fit(model, data)
    return str(root / "checkpoints" / "last.ckpt")


@pytest.fixture(params=["pixels", "latent"])
def feedback(request: pytest.FixtureRequest) -> str:
    return request.param


def by_hand(model: EncoderDecoder, batch: Any, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and windows of a roll-out from the first window of each clip, step by step."""
    features, embeddings, images = model.context_encoder(batch.observations[:, 0]), [], []
    for step in range(steps):
        hidden = torch.cat([model.predictor.norm(features), model.predictor.embed_action(batch.actions[:, step])], dim=-1)
        features = features + model.predictor.change(hidden)
        images.append(model.decoder(features))
        if model.feedback == "pixels":
            features = model.context_encoder(images[-1])
        embeddings.append(features)
    return torch.stack(embeddings, dim=1), torch.stack(images, dim=1)


def test_a_roll_out_feeds_back_what_it_says(points_root: Path, feedback: Any) -> None:
    data = small_trajectories(points_root, history=2)
    model = small_encoder_decoder(data, awake=True, feedback=feedback).eval()
    batch = data.first_clips(3, CPU)
    features, images = by_hand(model, batch, 3)
    start = model.encode_batch(batch)[:, 0]
    torch.testing.assert_close(model.forecast(start, 3, batch.actions[:, :3]), features)
    torch.testing.assert_close(model.rollout(batch.observations[:, 0], 3, batch.actions[:, :3]), features)
    torch.testing.assert_close(model.forecast_images(start, 3, batch.actions[:, :3]), images)
    assert images.shape == (3, 3, 2 * 3, 16, 16), "whole windows are decoded"
    every = model.encode_batch(batch)  # of several starts of a clip at once: (B, T, D)
    actions = batch.actions[:, None, :3].expand(-1, every.shape[1], -1, -1)
    for found, alone in zip(model.roll_out(every, 3, actions), model.roll_out(start, 3, batch.actions[:, :3]), strict=True):
        torch.testing.assert_close(found[:, 0], alone)
    again = model.context_encoder(images.flatten(0, 1)).unflatten(0, (3, 3))
    assert torch.allclose(features, again, atol=1e-5) == (feedback == "pixels")
    other = small_encoder_decoder(data, awake=True, feedback="latent" if feedback == "pixels" else "pixels").eval()
    other.load_state_dict(model.state_dict())  # the weights of one are weights of the other
    assert not torch.allclose(other.forecast(start, 3, batch.actions[:, :3]), features)


def test_the_loss_is_that_of_all_decoded_windows(points_root: Path, feedback: Any) -> None:
    data = small_trajectories(points_root)
    model = small_encoder_decoder(data, awake=True, feedback=feedback)
    batch = data.first_clips(2, CPU)
    pairs = model.target_pairs(batch)
    windows, expected = batch.observations, torch.zeros(())
    for start in range(3):
        cut = batch._replace(observations=windows[:, start:], actions=batch.actions[:, start:])
        features, images = by_hand(model, cut, 2)
        for step, weight in enumerate((4 / 3, 2 / 3)):
            expected = expected + weight * (images[:, step] - windows[:, start + 1 + step]).square().mean() / 6
        decoded = model.decoder(model.context_encoder(windows[:, start]))
        expected = expected + (decoded - windows[:, start]).square().mean() / 3
        torch.testing.assert_close(pairs.predictions[:, start], features)
    torch.testing.assert_close(model.prediction_loss(pairs), expected)
    torch.testing.assert_close(pairs.still_error, (windows[:, :3] - windows[:, 2:]).square().mean())


def test_the_forecast_alone_trains_all_networks(points_root: Path, feedback: Any) -> None:
    data = small_trajectories(points_root)
    model = small_encoder_decoder(data, awake=True, feedback=feedback)
    pairs = model.target_pairs(data.first_clips(2, CPU))
    pairs.images[:, :, -1].square().mean().backward()
    for name in ("context_encoder", "predictor", "decoder"):
        for place, parameter in model.get_submodule(name).named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, f"{name}.{place}"
    assert all(parameter.grad is None for parameter in model.target_encoder.parameters())
    assert not pairs.targets.requires_grad


def test_the_images_that_are_fed_back_carry_gradients(points_root: Path) -> None:
    """The second step knows of the start by the image of the first alone."""
    data = small_trajectories(points_root)
    model = small_encoder_decoder(data, awake=True, feedback="pixels")
    start = torch.randn(2, 8, requires_grad=True)
    images = model.roll_out(start, 2, torch.zeros(2, 2, 2))[1]
    (gradient,) = torch.autograd.grad(images[:, 1].sum(), start)
    assert gradient.abs().sum() > 0


def test_no_parameter_is_held_twice(tmp_path: Path, points_root: Path, feedback: Any) -> None:
    data = small_trajectories(points_root)
    model = small_encoder_decoder(data, feedback=feedback)
    run = trainer(tmp_path, max_steps=1)
    run.fit(model, data)
    optimized = [parameter for group in run.optimizers[0].param_groups for parameter in group["params"]]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(optimized) == len({id(parameter) for parameter in optimized}) == len(trained)
    kept = [value.data_ptr() for value in model.state_dict().values() if value.numel()]
    assert len(kept) == len(set(kept))
    for name, value in model.target_encoder.named_parameters():
        assert torch.equal(value, model.context_encoder.get_parameter(name)), "no EMA: a copy after every step"


def test_a_copy_goes_through_its_own_networks(points_root: Path) -> None:
    data = small_trajectories(points_root)
    model = small_encoder_decoder(data, awake=True, feedback="pixels").eval()
    other, start, actions = copy.deepcopy(model), torch.randn(2, 8), torch.zeros(2, 2, 2)
    with torch.no_grad():
        before = other.forecast(start, 2, actions)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(other.forecast(start, 2, actions), before)


def test_a_run_that_was_cut_goes_on_bit_for_bit(tmp_path: Path, points_root: Path, feedback: Any) -> None:
    def fit(out: Path, *callbacks: Any, path: str | None = None) -> EncoderDecoder:
        data = small_trajectories(points_root)
        model = small_encoder_decoder(data, feedback=feedback)
        last = LastCheckpoint(every_n_train_steps=1)
        run = trainer(out, max_epochs=2, limit_train_batches=5, enable_checkpointing=True, callbacks=[last, *callbacks])
        run.fit(model, data, ckpt_path=path)
        return model

    uncut = fit(tmp_path / "uncut")
    with pytest.raises(SystemExit):
        fit(tmp_path / "cut", Cut())
    resumed = fit(tmp_path / "cut", path=str(tmp_path / "cut" / "checkpoints" / "last.ckpt"))
    assert parameters_equal(uncut, resumed) and not parameters_equal(
        uncut, small_encoder_decoder(small_trajectories(points_root))
    )


def test_a_checkpoint_is_loaded_and_planned_with(tmp_path: Path, points_root: Path, feedback: Any) -> None:
    data = small_trajectories(points_root)
    path = saved(tmp_path, data, feedback=feedback, decoder_width=64)
    model, other = load(path), load(path)
    assert type(model) is EncoderDecoder and model.feedback == feedback and model.decoder.query_token.shape[-1] == 64
    batch = data.first_clips(3, CPU)
    start, goal, actions = batch.observations[:, 0], batch.observations[:, 4], batch.actions
    assert torch.equal(model.rollout(start, 4, actions), other.rollout(start, 4, actions))
    features = model.encode_batch(batch)[:, 0]
    assert torch.equal(model.forecast_images(features, 4, actions), other.forecast_images(features, 4, actions))
    found = model.plan(start, goal, 3, FAST)
    assert found.shape == (3, 3, 2) and torch.equal(found, other.plan(start, goal, 3, FAST))


def test_all_that_takes_a_world_model_takes_it(tmp_path: Path, points_root: Path, feedback: Any) -> None:
    data = small_trajectories(points_root)
    path = saved(tmp_path, data, feedback=feedback)
    for probe in (InverseModel(path, width=16), ImageDecoder(path, width=32, depth=1)):
        trainer(tmp_path / type(probe).__name__, max_steps=1, limit_val_batches=1.0).fit(probe, data)
    goals = GoalProbe(path, offset=3, horizon=2, radius=0.1, planner=FAST, num_episodes=1, baselines=["untrained", "replay"])
    trainer(tmp_path / "goals").test(goals, datamodule=data, verbose=False)
    report = json.loads((tmp_path / "goals" / "report.json").read_text())
    assert report["goals"]["replay"]["success"] == 1.0 and "world_model" in report["goals"]


def test_it_learns(tmp_path: Path, points_root: Path, feedback: Any) -> None:
    seed_everything(0)
    data = small_trajectories(points_root, batch_size=8)
    model = small_encoder_decoder(data, feedback=feedback, encoder_widths=(8, 16), latent_dim=16, learning_rate=5e-3)
    run = trainer(tmp_path, max_steps=150, limit_val_batches=1.0, check_val_every_n_epoch=1000)
    run.validate(model, datamodule=data, verbose=False)
    before = dict(run.callback_metrics)
    run.fit(model, data)
    assert {"train/pixel_loss", "train/reconstruction_loss"} <= run.callback_metrics.keys()
    run.validate(model, datamodule=data, verbose=False)
    after = run.callback_metrics
    assert after["val/pixel_loss"] < 0.3 * before["val/pixel_loss"] and after["val/loss"] < 0.3 * before["val/loss"]
    assert {"val/pixel_ratio", "val/persistence_ratio", "val/shuffled_over_true", "val/rankme"} <= after.keys()
    assert model.best_metric == ("val/pixel_loss", "min")


def test_the_figures_of_a_validation(tmp_path: Path, points_root: Path, feedback: Any) -> None:
    data = small_trajectories(points_root)
    model = small_encoder_decoder(data, awake=True, feedback=feedback)
    run = trainer(tmp_path, limit_val_batches=1)
    run.validate(model, datamodule=data, verbose=False)
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    windows, error = batch.observations, []
    for start in range(3):
        cut = batch._replace(observations=windows[:, start:], actions=batch.actions[:, start:])
        error.append((by_hand(model.eval(), cut, 2)[1][:, 1] - windows[:, start + 2]).square().mean())
    expected, still = torch.stack(error).mean(), (windows[:, :3] - windows[:, 2:]).square().mean()
    torch.testing.assert_close(run.callback_metrics["val/pixel_loss"], expected.detach())
    torch.testing.assert_close(run.callback_metrics["val/pixel_ratio"], (expected / still).detach())


def test_the_command_line_builds_it_and_loads_it(tmp_path: Path, points_root: Path) -> None:
    model = ["--model", "EncoderDecoder", "--model.feedback", "pixels", "--model.decoder_width", "32"]
    model += ["--model.encoder_widths", "[4]", "--model.horizon", "2", "--model.latent_dim", "8"]
    data = ["--data", "Trajectories", "--data.root", str(points_root), "--data.batch_size", "2", "--data.windows", "5"]
    run = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    root = ["--trainer.default_root_dir", str(tmp_path)]
    main(["fit", *model, *data, "--data.history", "2", "--trainer.max_steps", "2", *run, *root])
    found = load(tmp_path)
    assert type(found) is EncoderDecoder and found.feedback == "pixels" and found.history == 2 and found.regularizer is None
    main(["validate", "--ckpt_path", str(tmp_path), *run])


def test_it_knows_no_actions_and_goes_with_other_losses(tmp_path: Path, points_root: Path) -> None:
    data = small_trajectories(points_root)
    changes = {"regularizer": "vicreg", "inverse_dynamics": 0.1}
    trainer(tmp_path, max_steps=1).fit(small_encoder_decoder(data, **changes), data)
    model = EncoderDecoder(**(SMALL | {"image_size": (16, 24), "feedback": "pixels"}))
    assert model.forecast_images(model.encode(torch.zeros(2, 1, 3, 16, 24))[:, 0], 3).shape == (2, 3, 3, 16, 24)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"feedback": "both"}, "model.feedback='both': choose one of pixels, latent"),
        ({"observation": "vectors", "vector_dim": 2}, "model.observation='vectors': an EncoderDecoder predicts images"),
        ({"observation": "both", "vector_dim": 2}, "model.observation='both'"),
        ({"target_mode": "vjepa2"}, "model.target_mode='vjepa2'"),
        ({"decoder_width": 48}, "model.decoder_width=48: give a multiple of 32"),
        ({"decoder_width": 0}, "model.decoder_width=0"),
        ({"decoder_depth": 0}, "model.decoder_depth=0"),
        ({"image_size": 20, "encoder": "mlp"}, r"image_size=\[20, 20\]: this decoder draws patches of 8 pixels"),
        ({"horizon": 0}, "model.horizon=0"),
        ({"predictor": "prefix", "predictor_width": 64}, "model.predictor='prefix': an EncoderDecoder takes one step"),
    ],
)
def test_wrong_arguments_are_refused(changes: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EncoderDecoder(**changes)


def test_another_training_starts_from_the_decoder_too(tmp_path: Path, points_root: Path) -> None:
    data = small_trajectories(points_root)
    path = saved(tmp_path, data)
    first, second = load(path), EncoderDecoder.for_data(data, **SMALL)
    assert not parameters_equal(first.decoder, second.decoder)
    start_from(second, path)
    assert parameters_equal(first.decoder, second.decoder) and parameters_equal(first.predictor, second.predictor)
