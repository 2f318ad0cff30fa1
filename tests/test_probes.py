"""Frozen-encoder evaluation: frozen means frozen, probes find what is there, and the report says what it should."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import small_data, small_model, trainer

from datamodules.physics import Pendulum, state_labels
from jepa_lightning.networks.predictor import ResidualPredictor
from jepa_lightning.probes import DecoderProbe, StateProbe
from jepa_lightning.probes.baselines import PCA, RandomEncoder
from jepa_lightning.probes.dynamics.evaluation import Scene, constant_velocity, intersection_over_union, state_from_labels
from jepa_lightning.probes.ridge import LinearReadout, MLPReadout, fit_predictor
from jepa_lightning.rollouts import unroll


@pytest.fixture(scope="module")
def jepa_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A barely trained JEPA from pixels."""
    root = tmp_path_factory.mktemp("jepa")
    model = small_model(observation="pixels", image_size=32, encoder_widths=(4, 8))
    run = trainer(root, max_steps=2)
    run.fit(model, pixel_data())
    run.save_checkpoint(root / "jepa.ckpt")
    return str(root / "jepa.ckpt")


def pixel_data(**changes):
    return small_data(observation="pixels", image_size=32, **changes)


def test_fitting_a_decoder_leaves_the_frozen_networks_as_they_were(jepa_checkpoint: str, tmp_path: Path) -> None:
    probe = DecoderProbe(jepa_checkpoint, width=4)
    before = {name: value.clone() for name, value in probe.jepa.state_dict().items()}
    decoder_before = {name: value.clone() for name, value in probe.decoders.state_dict().items()}
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=1.0)
    run.fit(probe, pixel_data(clip_length=4))
    assert all(torch.equal(value, before[name]) for name, value in probe.jepa.state_dict().items())
    assert any(not torch.equal(value, decoder_before[name]) for name, value in probe.decoders.state_dict().items())
    probe.train()
    assert not any(module.training for module in [*probe.jepa.modules(), *probe.encoders.modules()])
    assert not any(p.requires_grad for p in [*probe.jepa.parameters(), *probe.encoders.parameters()])
    assert {"val/mse_jepa", "val/mse_random_encoder", "val/mse_pca", "val/loss"} <= set(run.callback_metrics)
    assert (tmp_path / "reconstruction.png").stat().st_size > 1000


def test_decoders_of_all_encoders_see_the_same_samples_and_learn_alone(jepa_checkpoint: str) -> None:
    probe = DecoderProbe(jepa_checkpoint, width=4, decoder="mlp")
    probe.log = probe.log_dict = lambda *_, **__: None
    data = pixel_data(clip_length=4)
    batch = data.observe(data.trajectories("train")[:4, :4])
    probe.training_step(batch, 0).backward()
    together = [p.grad.clone() for p in probe.decoders["jepa"].parameters()]
    probe.zero_grad()
    frames = probe.newest_frame(batch)
    torch.nn.functional.mse_loss(probe.decode(probe.features(batch)["jepa"]), frames).backward()
    alone = [p.grad for p in probe.decoders["jepa"].parameters()]
    assert all(torch.allclose(a, b) for a, b in zip(together, alone, strict=True))
    assert torch.equal(frames, batch.observations[:, :, 1:])  # the newest of two gray frames


def test_pca_equals_an_exact_decomposition() -> None:
    inputs = torch.randn(300, 12) * torch.tensor([5.0, 4, 3, 2] + [0.1] * 8) + 3
    pca = PCA(12, 4)
    pca.fit(inputs.view(300, 3, 4))
    found = pca(inputs.view(300, 3, 4))
    centered = inputs - inputs.mean(0)
    _, _, directions = torch.linalg.svd(centered, full_matrices=False)
    exact = centered @ directions[:4].T
    # The same subspace: each explains the other completely, up to one common factor.
    fitted = found @ torch.linalg.lstsq(found, exact).solution
    torch.testing.assert_close(fitted, exact, rtol=1e-2, atol=1e-2)
    assert found.var(0).mean() == pytest.approx(1, rel=0.01)


def test_pca_of_fewer_inputs_than_components_pads_with_zeros() -> None:
    pca = PCA(3, 5)
    pca.fit(torch.randn(50, 3))
    assert torch.equal(pca(torch.randn(7, 3))[:, 3:], torch.zeros(7, 2))


def test_baselines_are_untrained_repeatable_and_of_unit_variance(jepa_checkpoint: str, tmp_path: Path) -> None:
    probes = [DecoderProbe(jepa_checkpoint, width=4) for _ in range(2)]
    for first, second in zip(*(p.encoders["random_encoder"].parameters() for p in probes), strict=True):
        assert torch.equal(first, second)
    assert isinstance(probes[0].encoders["random_encoder"], RandomEncoder)
    trainer(tmp_path, max_steps=1).fit(probes[0], pixel_data(clip_length=4, size=200))
    data = pixel_data(size=200)
    features = probes[0].features(data.observe(data.trajectories("train")))
    for name in ("random_encoder", "pca"):
        assert features[name].flatten(0, 1).var(0).mean() == pytest.approx(1, rel=0.3), name


def test_probes_find_a_linear_and_a_curved_state() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4000, 6, generator=generator)
    labels = torch.stack([features[:, 0] * 3 + 2, (features[:, 1] * 2).sin()], dim=1)
    linear, mlp = LinearReadout(6, 2), MLPReadout(6, 2, 32)
    linear.fit(features[:3000], labels[:3000], features[3000:], labels[3000:])
    mlp.fit(features[:3000], labels[:3000], num_steps=400, learning_rate=1e-2)
    held_out, truth = features[3000:], labels[3000:]
    error = [((probe(held_out) - truth).square().mean(0) / truth.var(0)).tolist() for probe in (linear, mlp)]
    assert error[0][0] < 1e-4 and error[0][1] > 0.3
    assert error[1][0] < 0.02 and error[1][1] < 0.05


def test_a_dead_feature_is_not_blown_up() -> None:
    features = torch.randn(500, 3)
    features[:, 1] = 2.0
    probe = MLPReadout(3, 1, 16)
    probe.fit(features, features[:, :1], num_steps=50, learning_rate=1e-2)
    moved = features + torch.tensor([0.0, 1e-3, 0.0])  # what a predictor may do to it
    assert (probe(moved) - probe(features)).abs().max() < 0.05


def test_ridge_penalty_is_chosen_on_validation_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 25, generator=generator)  # few samples: little penalty overfits
    labels = features[:, :1] + 2 * torch.randn(30, 1, generator=generator)
    other = torch.randn(500, 25, generator=generator)
    assert LinearReadout(25, 1).fit(features, labels, other, other[:, :1]) == 0.1
    assert LinearReadout(25, 1).fit(features, labels, features, labels) == 1e-6


def test_baseline_predictor_learns_a_linear_motion() -> None:
    generator = torch.Generator().manual_seed(0)
    rotation = torch.matrix_exp(0.3 * (turn := torch.randn(8, 8, generator=generator)).sub(turn.T))
    clips = [torch.randn(400, 8, generator=generator)]
    for _ in range(9):
        clips.append(clips[-1] @ rotation.T)
    features = torch.stack(clips, dim=1)
    torch.manual_seed(0)
    predictor = ResidualPredictor(8, 64)
    fit_predictor(predictor, unroll, features, 2, num_steps=400, learning_rate=3e-3)
    with torch.no_grad():
        forecast = unroll(predictor, features[:, 0], 2)
    still = (features[:, :1] - features[:, 1:3]).square().mean()
    assert (forecast - features[:, 1:3]).square().mean() < 0.3 * still


def test_labels_and_states_are_inverse() -> None:
    states = (torch.rand(50, 4) - 0.5) * 6
    torch.testing.assert_close(state_from_labels(state_labels(states)), states, rtol=1e-4, atol=1e-4)


def test_constant_velocity_is_right_without_forces() -> None:
    state = torch.tensor([[0.3, -0.2, 1.0, -2.0]])
    assert constant_velocity(state, 2)[0, 1].tolist() == pytest.approx([0.4, -0.4, 1.0, -2.0])


def test_intersection_over_union() -> None:
    one, other = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    one[..., :2, :] = 1
    other[..., 1:3, :] = 1
    assert intersection_over_union(one, other).item() == pytest.approx(4 / 12)
    assert intersection_over_union(one, one).item() == 1
    assert intersection_over_union(other * 0.4, one).item() == 0


def test_decoded_coordinates_are_drawn_where_they_are() -> None:
    pendulum = Pendulum()
    states = (torch.rand(20, 12, 4) - 0.5) * 6
    scene = Scene(pendulum, 32, states)
    torch.testing.assert_close(scene.image(pendulum.positions(states[:, 9])), scene.draw(states[:, 9]), rtol=0, atol=1e-4)
    assert scene.overlap(scene.draw(states[:, 9]), 1) == pytest.approx(1)
    assert scene.position_errors(states[:, 9:11]).max() == 0


@pytest.mark.parametrize("observation", ["pixels", "coordinates"])
def test_the_whole_second_phase_writes_a_report(observation: str, tmp_path: Path) -> None:
    pixels = {"image_size": 32, "encoder_widths": (4, 8)} if observation == "pixels" else {}
    data = {"observation": observation, "image_size": 32, "test_sequence_length": 50, "test_size": 6}
    run = trainer(tmp_path, max_steps=2)
    run.fit(small_model(observation=observation, **({"image_size": 32} | pixels)), small_data(**data))
    run.save_checkpoint(tmp_path / "jepa.ckpt")
    run = trainer(tmp_path, max_steps=2)
    run.fit(DecoderProbe(str(tmp_path / "jepa.ckpt"), width=4), small_data(clip_length=4, **data))
    run.save_checkpoint(tmp_path / "decoder.ckpt")
    probe = StateProbe(
        str(tmp_path / "jepa.ckpt"), str(tmp_path / "decoder.ckpt"), hidden_dim=8, num_steps=20, control_steps=5
    )
    run = trainer(tmp_path, max_epochs=1, limit_val_batches=1.0)
    run.fit(probe, small_data(**data))
    run.test(probe, small_data(**data), verbose=False)

    report = json.loads((tmp_path / "report.json").read_text())
    labels = {"sin_theta1", "cos_theta1", "sin_theta2", "cos_theta2", "omega1", "omega2"}
    for figures in (report, report["baselines"]["random_encoder"], report["baselines"]["pca"]):
        assert set(figures["probe"]["linear_r2"]) == set(figures["probe"]["mlp_r2"]) == labels
        assert {"1", "8"} <= set(figures["rollout"]["ratio_to_persistence"])
        assert {"0", "8", "16"} == set(figures["decoder"]["iou"])
        assert figures["decoder"]["mse"] > 0 and figures["decoder"]["mse_over_mean_image"] > 0
        assert figures["vpt_frames"] >= 1 and figures["rankme"] >= 1
    assert report["baselines"]["persistence"]["vpt_frames"] <= report["baselines"]["constant_velocity"]["vpt_frames"]
    assert report["seconds"]["report"] > 0 and report["config"]["latent_dim"] == 8
    table = (tmp_path / "report.md").read_text()
    assert "| linear R2 of omega2 |" in table and "constant velocity" in table
    for file in ("forecast.mp4", "reconstruction.png", "forecast_error.png"):
        assert (tmp_path / file).stat().st_size > 1000
    # Not refitted: a second test, from the checkpoint, gives the same figures.
    run.save_checkpoint(tmp_path / "state.ckpt")
    again = trainer(tmp_path)
    again.test(
        StateProbe.load_from_checkpoint(tmp_path / "state.ckpt", weights_only=True), small_data(**data), verbose=False
    )
    repeated = json.loads((tmp_path / "report.json").read_text())
    assert repeated["probe"] == report["probe"] and repeated["rollout"] == report["rollout"]
    assert all(math.isfinite(v) for v in report["rollout"]["ratio_to_persistence"].values())


@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "foreign", "probe", "text"])
def test_a_probe_on_a_wrong_checkpoint_says_what_is_wrong(kind: str, jepa_checkpoint: str, tmp_path: Path) -> None:
    path = tmp_path / "given.ckpt"
    content = Path(jepa_checkpoint).read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "foreign":
        torch.save({"state_dict": {"w": torch.ones(1)}}, path)
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "probe":
        run = trainer(tmp_path, max_steps=1)
        run.fit(DecoderProbe(jepa_checkpoint, width=4), pixel_data(clip_length=4))
        run.save_checkpoint(path)
    error, message = {
        "missing": (FileNotFoundError, "No checkpoint at .*given.ckpt"),
        "truncated": (ValueError, "given.ckpt cannot be read"),
        "empty": (ValueError, "given.ckpt cannot be read"),
        "foreign": (ValueError, "given.ckpt is no checkpoint of this application"),
        "text": (ValueError, "given.ckpt cannot be read"),
        "probe": (ValueError, "given.ckpt holds DecoderProbe, not a JEPA"),
    }[kind]
    with pytest.raises(error, match=message):
        StateProbe(str(path))


def test_a_decoder_of_another_jepa_is_refused(jepa_checkpoint: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1)
    run.fit(DecoderProbe(jepa_checkpoint, encoder="context", width=4), pixel_data(clip_length=4))
    run.save_checkpoint(tmp_path / "decoder.ckpt")
    with pytest.raises(ValueError, match="decoder.ckpt decodes another encoder"):
        StateProbe(jepa_checkpoint, str(tmp_path / "decoder.ckpt"))
    probe = StateProbe(jepa_checkpoint, str(tmp_path / "decoder.ckpt"), encoder="context", num_steps=2, control_steps=2)
    trainer(tmp_path, max_epochs=1, limit_val_batches=1.0).fit(probe, pixel_data(size=8))
    assert probe.encoders["pca"].components.abs().sum() > 0
    assert torch.equal(probe.encoders["pca"].components, probe.decoder.encoders["pca"].components)


def test_a_probe_refuses_data_of_another_kind(jepa_checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_size=32 but data.image_size=64"):
        trainer(tmp_path, max_steps=1).fit(
            DecoderProbe(jepa_checkpoint, width=4), small_data(observation="pixels", image_size=64)
        )


def test_short_test_trajectories_are_refused(jepa_checkpoint: str, tmp_path: Path) -> None:
    probe = StateProbe(jepa_checkpoint, hidden_dim=4, num_steps=2, control_steps=2)
    with pytest.raises(ValueError, match="test_sequence_length to at least 110"):
        trainer(tmp_path).test(probe, pixel_data(test_sequence_length=20), verbose=False)
