"""The report's figures, on forecasts whose worth is known."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import small_data
from torch import Tensor, nn

from datamodules.physics import FRAME_SECONDS, LABELS, Pendulum, sample_initial_states, state_labels
from datamodules.rng import seeded_generator
from jepa_lightning.figures import side_by_side
from jepa_lightning.metrics import FeatureStatistics
from jepa_lightning.probes.dynamics import evaluation
from jepa_lightning.probes.dynamics.evaluation import (
    DECODE_STEPS,
    ENERGY_STEPS,
    RATIO_STEPS,
    START,
    Scene,
    constant_velocity,
    decoder_figures,
    energy_figures,
    forecast_panels,
    intersection_over_union,
    rankme,
    ratios_to_persistence,
    readout_figures,
    state_from_labels,
    validity_figures,
)

PENDULUM = Pendulum(masses=(1.3, 0.7), lengths=(0.8, 1.1), gravity=9.0)
WINDOWS = 50


@pytest.fixture(scope="module")
def states() -> Tensor:
    """True states of 5 trajectories, (5, 50, 4)."""
    return PENDULUM.simulate(sample_initial_states(5, seeded_generator(3)), WINDOWS, dtype=torch.float32)


def scene(states: Tensor) -> Scene:
    return Scene(PENDULUM, 16, states)


def truth(states: Tensor) -> Tensor:
    """What a perfect model forecasts, as labels: (5, K, 6)."""
    return state_labels(states[:, START + 1 :])


def test_steps_of_the_report() -> None:
    """What stands in published reports, and must not move."""
    assert (START, evaluation.MAX_STEPS, evaluation.VALID_BELOW, FRAME_SECONDS) == (8, 100, 0.4, 0.05)
    assert (RATIO_STEPS, DECODE_STEPS, ENERGY_STEPS) == ((1, 2, 4, 8, 16, 30), (0, 8, 16), (8, 16, 30))
    assert (evaluation.FILM_TRAJECTORIES, evaluation.FILM_FRAMES) == (3, 60)


def test_states_are_read_from_labels() -> None:
    angles = torch.linspace(-3.0, 3.0, 13)
    states = torch.stack([angles, angles.flip(0), 2 * angles, 3 - angles], dim=1)
    torch.testing.assert_close(state_from_labels(state_labels(states)), states, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state_from_labels(3 * state_labels(states))[:, :2], states[:, :2], rtol=1e-5, atol=1e-5)


def test_constant_velocity_turns_each_rod_at_its_own_pace() -> None:
    states = torch.tensor([[0.3, -0.2, 1.0, -2.0], [1.0, 2.0, 0.0, 4.0]])
    found = constant_velocity(states, 3)
    for step in range(3):
        seconds = 0.05 * (step + 1)
        expected = torch.stack([states[:, 0] + seconds * states[:, 2], states[:, 1] + seconds * states[:, 3]], dim=1)
        torch.testing.assert_close(found[:, step], torch.cat([expected, states[:, 2:]], dim=1))
    assert constant_velocity(states.to("meta"), 3).device.type == "meta", "made where the states are"


@pytest.mark.parametrize(
    ("mine", "true", "expected"),
    [
        ([[1, 1, 0, 0]], [[0, 1, 1, 1]], 1 / 4),
        ([[1, 0, 0, 0], [0, 1, 0, 0]], [[1, 1, 0, 0], [0, 0, 0, 0]], 1),  # bright in any channel
        ([[0, 0, 0, 0]], [[0, 0, 0, 0]], 0),  # nothing is not divided by
        ([[0.5, 0.6, 0, 0]], [[1, 1, 0, 0]], 1 / 2),  # brighter than a half
    ],
)
def test_overlap_of_two_images(mine: list, true: list, expected: float) -> None:
    images = [torch.tensor(values, dtype=torch.float32).view(1, -1, 2, 2) for values in (mine, true)]
    assert intersection_over_union(*images).tolist() == [pytest.approx(expected)]
    both = intersection_over_union(torch.cat([images[0], images[1]]), torch.cat([images[1]] * 2))
    assert both.tolist() == [pytest.approx(expected), float(images[1].sum() > 0)], "each image has its own"


def test_valid_prediction_times_of_known_errors() -> None:
    errors = torch.full((4, 10), 0.1)
    errors[0, 2], errors[1, 4], errors[2, 5] = 0.41, 0.5, 0.39  # the last two stay below 0.4
    errors[3, 8] = 0.21
    times = torch.tensor([3.0, 5.0, 10.0, 10.0])
    assert validity_figures(errors) == {
        "vpt_frames": 5.0,
        "vpt_frames_mean": 7.0,
        "vpt_frames_standard_error": pytest.approx(times.std().item() / 2),
        "vpt_frames_at_0.2": 5.0,  # of 3, 5, 6, 9
    }


def test_position_errors_are_distances_over_the_spread(states: Tensor) -> None:
    positions = PENDULUM.positions(states).flatten(0, 1).double()
    spread = math.sqrt(sum(positions[:, axis].var().item() for axis in range(4)))
    guess = states[:, START + 1 : START + 4] + torch.tensor([0.0, 0.3, 0.0, 0.0])
    found = scene(states).position_errors(guess)
    assert found.shape == (5, 3)
    # The second rod alone is turned: its bob moves along a chord.
    torch.testing.assert_close(found, torch.full((5, 3), 2 * 1.1 * math.sin(0.15) / spread), rtol=1e-4, atol=1e-5)
    assert scene(states).position_errors(states[:, START : START + 3]).min() > 1e-3, "one step late"


def test_scene_draws_and_compares_at_the_right_step(states: Tensor) -> None:
    one = scene(states)
    for k in (0, 1, 16):
        drawn = one.draw(states[:, START + k])
        assert drawn.shape == (5, 1, 16, 16) and one.overlap(drawn, k) == 1
        assert one.overlap(one.draw(states[:, START + k + 6]), k) < 0.7
        assert one.image(drawn) is drawn
        torch.testing.assert_close(one.image(PENDULUM.positions(states[:, START + k])), drawn, rtol=0, atol=1e-4)


def test_ratios_are_errors_over_changes() -> None:
    times = torch.arange(WINDOWS, dtype=torch.float32)
    features = torch.stack([times, -2 * times])[..., None].expand(-1, -1, 3)  # (2, T, 3), k from the start after k steps
    steps = torch.arange(1.0, 42.0)
    forecast = (
        features[:, START + 1 : START + 42] + (steps.square() / 10)[None, :, None] * torch.tensor([1.0, 2.0])[:, None, None]
    )
    found = ratios_to_persistence(features, forecast)
    assert list(found) == ["1", "2", "4", "8", "16", "30"]
    for k in RATIO_STEPS:
        assert found[str(k)] == pytest.approx((k / 10) ** 2, rel=1e-4)
    frozen = features[:, START : START + 1].expand(-1, 41, -1)
    assert ratios_to_persistence(features, frozen) == {str(k): 1.0 for k in RATIO_STEPS}


class Scaled(nn.Module):
    """A probe that multiplies."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, features: Tensor) -> Tensor:
        """(..., L) -> (..., L)."""
        return self.factor * features


def plain_r2(predictions: Tensor, targets: Tensor) -> float:
    predictions, targets = predictions.flatten().double(), targets.flatten().double()
    return 1 - ((predictions - targets).square().mean() / (targets - targets.mean()).square().mean()).item()


def test_probes_are_evaluated_on_encoded_and_on_forecast_embeddings(states: Tensor) -> None:
    probe = SimpleNamespace(linear={"jepa": Scaled(0.5)}, mlp={"jepa": Scaled(0.9)})
    features = state_labels(states)
    forecast = truth(states).clone()
    forecast[:, 7] += 0.1  # 8 steps ahead
    found = readout_figures(probe, "jepa", features, forecast, states)
    assert set(found) == {"linear_r2", "mlp_r2", "linear_r2_forecast", "mlp_r2_forecast"}
    for kind, factor in (("linear", 0.5), ("mlp", 0.9)):
        assert list(found[f"{kind}_r2"]) == list(LABELS)
        assert list(found[f"{kind}_r2_forecast"]) == ["1", "8", "16"]
        for place, label in enumerate(LABELS):
            value = features[..., place]
            assert found[f"{kind}_r2"][label] == pytest.approx(plain_r2(factor * value, value), abs=1e-4)
            for k, off in ((1, 0.0), (8, 0.1), (16, 0.0)):
                value = features[:, START + k, place]
                expected = plain_r2(factor * (value + off), value)
                assert found[f"{kind}_r2_forecast"][str(k)][label] == pytest.approx(expected, abs=1e-3)


def test_energy_errors_are_medians_relative_to_the_energy_above_rest(states: Tensor) -> None:
    """Forecasts that keep their energy have no error but the probe's; others have what they gained or lost."""
    one, features = scene(states), state_labels(states)
    assert all(value < 5e-3 for value in energy_figures(nn.Identity(), one, features, truth(states)).values())
    forecast = truth(states).clone()
    forecast[:, 15, 4:] *= 1.5  # 16 steps ahead, both rods are faster
    scaled = Scaled(1.0)
    scaled.forward = lambda z: torch.cat([z[..., :4], 1.1 * z[..., 4:]], dim=-1)
    found = energy_figures(scaled, one, features, forecast)

    def energy(at: Tensor, factor: float) -> Tensor:
        return PENDULUM.energy(torch.cat([at[:, :2], factor * at[:, 2:]], dim=1))

    start = states[:, START]
    scale = energy(start, 1.0) - PENDULUM.lowest_energy
    first = energy(start, 1.1)
    expected = {"0": ((first - energy(start, 1.0)).abs() / scale).median().item()}
    for k, factor in ((8, 1.1), (16, 1.65), (30, 1.1)):
        expected[str(k)] = ((energy(states[:, START + k], factor) - first).abs() / scale).median().item()
    assert list(found) == ["0", "8", "16", "30"]
    assert found == pytest.approx(expected, rel=1e-2)
    assert len({round(value, 3) for value in expected.values()}) == 4, "four different figures"


def test_rankme_of_all_embeddings_of_all_times() -> None:
    features = torch.randn(40, 30, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 1, 1, 1e-6, 1e-6, 1e-6]
    )
    statistics = FeatureStatistics(6)
    statistics.update(features)
    assert rankme(features) == pytest.approx(3, abs=0.01) == statistics.compute()["rankme"].item()


class Painter:
    """A decoder of embeddings that are positions already, with an error added."""

    def __init__(self, error: float = 0.0) -> None:
        self.error, self.jepa = error, SimpleNamespace(history=2)

    def newest_frame(self, batch) -> Tensor:
        """The newest of two frames."""
        return batch.observations[:, :, -4:]

    def decode(self, features: Tensor, name: str = "jepa") -> Tensor:
        """(N, 4) -> (N, 4)."""
        assert name == "jepa"
        return features + self.error


def test_decoded_images_are_compared_with_their_own_times(states: Tensor) -> None:
    data = small_data(history=2, masses=PENDULUM.masses, lengths=PENDULUM.lengths)
    features = PENDULUM.positions(states)
    forecast = features[:, START + 1 :].clone()
    exact = decoder_figures(Painter(), "jepa", scene(states), data, features, forecast)
    assert exact["iou"] == pytest.approx({"0": 1, "8": 1, "16": 1}, abs=1e-6) and exact["mse"] < 1e-10
    forecast[:, 7] = features[:, START + 2]  # 8 steps ahead, something else
    overlap = decoder_figures(Painter(), "jepa", scene(states), data, features, forecast)["iou"]
    assert overlap["0"] == overlap["16"] == pytest.approx(1, abs=1e-6) and overlap["8"] < 0.6
    found = decoder_figures(Painter(0.1), "jepa", scene(states), data, features, forecast)
    assert found["mse"] == pytest.approx(0.01, rel=1e-3)
    times = torch.linspace(0, WINDOWS - 1, 9).long()
    frames = features[:, times].flatten(0, 1)
    variance = (frames - frames.mean(dim=0)).square().mean().item()
    assert found["mse_over_mean_image"] == pytest.approx(0.01 / variance, rel=1e-3)


def film_probe(forecast) -> SimpleNamespace:
    return SimpleNamespace(decoder=Painter(), forecast=forecast, jepa=SimpleNamespace(channels=1))


def film_of(probe: SimpleNamespace, shown: Scene, features: Tensor) -> np.ndarray:
    return np.concatenate([side_by_side(panels) for panels in forecast_panels(probe, shown, features)])


def test_the_film_starts_its_forecast_from_the_first_frame(states: Tensor) -> None:
    features, asked = PENDULUM.positions(states), []

    def forecast(start: Tensor, count: int) -> Tensor:
        row = int((features[:, START] == start).all(dim=1).nonzero())
        asked.append((row, count))
        return features[row, START + 1 : START + 1 + count]

    film = film_of(film_probe(forecast), scene(states), features)
    assert asked == [(0, 41), (1, 41), (2, 41)], "three trajectories, as far as they go"
    assert film.shape[0] == 3 * 42 and film.dtype.name == "uint8"
    truth_panel, forecast_panel, reconstruction = (film[:, 37:100, left : left + 64].astype(int) for left in (0, 72, 144))
    assert (abs(forecast_panel - reconstruction) <= 1).all() and (abs(truth_panel - reconstruction) <= 1).all()
    assert truth_panel.max() > 150
    frozen = film_of(film_probe(lambda z, count: z.expand(count, -1)), scene(states), features)
    forecast_panel = frozen[:, 37:100, 72 : 72 + 64].astype(int)
    assert (forecast_panel[:42] == forecast_panel[0]).all() and not (forecast_panel[:42] == forecast_panel[42]).all()
    assert len(film_of(film_probe(lambda z, count: z.expand(count, -1)), scene(states[:2]), features[:2])) == 2 * 42
    longer = torch.cat([states, states], dim=1)
    assert len(film_of(film_probe(lambda z, n: z.expand(n, -1)), scene(longer), PENDULUM.positions(longer))) == 180
