"""Planning: the search finds what is best, the world does what physics says, and the probe evaluates both."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import small_data, small_driven_data, small_driven_model, small_model, trainer

from datamodules.physics import Pendulum
from jepa_lightning.planner import Planner
from jepa_lightning.probes import ImageDecoder, PlanningProbe, StateProbe
from jepa_lightning.probes.dynamics.episodes import Imagination, Planning, Random, Zero, run
from jepa_lightning.probes.dynamics.pendulum_episodes import Oracle, PendulumWorld, distances, reaching_task, standing_task
from jepa_lightning.probes.dynamics.planning_report import action_figures


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_world_does_what_physics_says_and_shows_what_the_data_module_shows() -> None:
    data = small_driven_data(observation="pixels", image_size=32)
    task = standing_task(data, 3, (0.0, 2.0), seeded())
    world = PendulumWorld(data, task.starts)
    actions = torch.tensor([[1.0, -1.0], [0.0, 0.0], [-0.5, 0.3]])
    before = world.states
    world.act(actions)
    torques = (actions.double() * torch.tensor([10.0, 5.0]))[:, None].expand(-1, 5, -1)
    assert torch.equal(world.frames[:, -5:], data.pendulum.simulate(before, 6, torques)[:, 1:])
    assert world.frames.shape == (3, 3 + 5, 4)
    assert torch.equal(world.window(), data.observe(world.frames[:, -3:].float()).observations)
    still = data.observe(task.goals.float()).observations
    assert torch.equal(still[:, 0, 0], still[:, 0, 2]), "the goal of standing is three times the same image"
    tips = data.pendulum.positions(task.goals)[..., 2:]
    torch.testing.assert_close(tips, torch.tensor([0.0, 2.0], dtype=torch.float64).expand_as(tips))


def test_goals_were_reached_and_no_episode_starts_at_its_own() -> None:
    data = small_driven_data()
    task = reaching_task(data, 400, 5, 0.25, seeded())  # a few in a hundred would
    assert task.starts.shape == task.goals.shape == (400, 3, 4)
    assert (distances(data, task.starts[:, -1], task.goals[:, -1]).amax(dim=-1) > 0.25).all()
    again = reaching_task(data, 400, 5, 0.25, seeded())
    assert torch.equal(task.goals, again.goals)


def test_who_knows_the_physics_reaches_goals_and_who_does_nothing_does_not() -> None:
    data = small_driven_data()
    task = reaching_task(data, 20, 5, 0.25, seeded())
    goals = task.goals[:, -1]

    def success(controller: Any) -> float:
        world = run(PendulumWorld(data, task.starts), controller, 5)
        assert world.frames.shape[1] == 3 + 25
        return (distances(data, world.states, goals).amax(dim=-1) < 0.25).double().mean().item()

    planner = Planner(num_samples=128, num_iterations=15)

    def oracle(noise: tuple[float, float]) -> Planning:
        return Planning(planner, Oracle(goals, noise, seeded(1)), 5, seeded(2), deadline=5, every=5)

    assert success(oracle((0.0, 0.0))) >= 0.95
    assert success(oracle((1.0, 5.0))) <= 0.5
    assert success(Zero()) <= 0.4 and success(Random(seeded(3))) <= 0.4


def test_plans_end_at_the_deadline_and_go_on_from_the_last_one() -> None:
    data, lengths, guesses = small_driven_data(), [], []

    class Spy(Planner):
        def plan(self, cost, guess, generator, further=False, num_choices=0):
            lengths.append((guess.shape[1], further))
            guesses.append(guess)
            return torch.rand(guess.shape, generator=generator)

    task = standing_task(data, 2, (0.0, 2.0), seeded())
    run(PendulumWorld(data, task.starts), Planning(Spy(), lambda world: None, 8, seeded(), deadline=5, every=2), 5)
    assert lengths == [(5, False), (3, True), (1, True)]
    lengths.clear()
    shrinking = Planning(Spy(), lambda world: None, 3, seeded(), shrinking=True)
    run(PendulumWorld(data, task.starts), shrinking, 7)
    assert [length for length, _ in lengths] == [3, 2, 1, 3, 2, 1, 3], "arrival is not put off, and begins anew"
    assert [further for _, further in lengths] == [False, True, True, False, True, True, False], "a new plan from scratch"
    lengths.clear(), guesses.clear()
    controller = Planning(Spy(), lambda world: None, 4, seeded())
    run(PendulumWorld(data, task.starts), controller, 3)
    assert lengths == [(4, False), (4, True), (4, True)]
    first = torch.rand(2, 4, 2, generator=seeded())
    assert torch.equal(guesses[1][:, :3], first[:, 1:]) and not guesses[1][:, 3].any()


class Physics(torch.nn.Module):
    """A predictor that knows: embeddings are states."""

    def forward(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        torques = (actions * torch.tensor([10.0, 5.0])).flatten(0, -2)[:, None].expand(-1, 5, -1)
        return Pendulum().simulate(states.flatten(0, -2), 6, torques, substeps=2)[:, -1].view_as(states)

    @staticmethod
    def unrolled(states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        for step in range(actions.shape[1]):
            states = Physics()(states, actions[:, step])
        return states


def test_a_model_that_uses_actions_has_a_larger_error_under_other_actions(tmp_path: Path) -> None:
    data = small_driven_data(test_size=5, test_sequence_length=60)
    batch = data.observe(data.trajectories("test"))
    probe = PlanningProbe(saved(tmp_path))
    probe.jepa.predictor = Physics()
    errors = probe.rollout_errors(batch.states, batch.actions)
    assert set(errors) == {"true", "shuffled", "zero", "still"} and errors["true"].shape == (10,)
    figures = action_figures(errors)
    assert figures["shuffled_over_true"] > 10 and figures["zero_over_true"] > 10
    assert figures["true_over_persistence"]["10"] < 0.1
    # By hand: the fourth step under the actions of the trajectory before.
    others = batch.actions.roll(1, dims=0)
    starts = range(batch.states.shape[1] - 10)
    found = [(Physics.unrolled(batch.states[:, s], others[:, s : s + 4]) - batch.states[:, s + 4]).square() for s in starts]
    torch.testing.assert_close(errors["shuffled"][3], torch.stack(found).mean(), rtol=1e-3, atol=1e-3)


def test_a_perfect_world_model_reaches_goals() -> None:
    """With embeddings that are the state and a predictor that is the physics."""
    data = small_driven_data()
    model = small_driven_model(latent_dim=4)
    model.predictor = Physics()
    task = reaching_task(data, 10, 5, 0.25, seeded())
    model.encode = lambda windows, vectors: windows  # the world below shows states
    planner = Planner(num_samples=200, num_iterations=25)
    imagination = Imagination(model, task.goals[:, -1:].float(), planner)

    class Seer(PendulumWorld):
        def window(self) -> torch.Tensor:
            return self.frames[:, -1:].float()

    world = Seer(data, task.starts)
    controller = Planning(planner, imagination, 5, seeded(), deadline=5, every=5)
    for step in range(5):
        world.act(controller(world, step))
    assert (distances(data, world.states, task.goals[:, -1]).amax(dim=-1) < 0.25).double().mean() >= 0.8
    predicted = torch.cat(controller.predicted, dim=1)
    torch.testing.assert_close(predicted[:, -1].double(), world.states, rtol=1e-2, atol=2e-2)


def saved(tmp_path: Path, **changes: Any) -> str:
    model = small_driven_model(**changes)
    run = trainer(tmp_path, max_steps=2)
    run.fit(model, small_driven_data())
    run.save_checkpoint(tmp_path / "jepa.ckpt")
    return str(tmp_path / "jepa.ckpt")


def saved_free(tmp_path: Path, **data: Any) -> str:
    run = trainer(tmp_path, max_steps=1)
    run.fit(small_model(horizon=1), small_data(**data))
    run.save_checkpoint(tmp_path / "free.ckpt")
    return str(tmp_path / "free.ckpt")


FEW = Planner(num_samples=8, num_iterations=2, num_further_iterations=1, num_elites=2)


def test_probe_writes_what_its_report_promises(tmp_path: Path) -> None:
    probe = PlanningProbe(saved(tmp_path), planner=FEW, num_episodes=4, num_swing_ups=2)
    trainer(tmp_path).test(probe, small_driven_data(test_size=4), verbose=False)
    report = json.loads((tmp_path / "report.json").read_text())
    figures = report["planning"]
    for name in ("success", "standard_error", "zero_torque", "random_torque", "oracle", "noisy_oracle", "swing_up"):
        assert 0 <= figures[name] <= 1, name
    assert figures["episodes"] == 4
    assert report["data"]["torque_limits"] == [10.0, 5.0] and report["planner"]["num_samples"] == 8
    # A predictor whose last layer is near zero hardly listens to actions.
    assert report["actions"]["shuffled_over_true"] == pytest.approx(1, abs=0.2)
    assert (tmp_path / "rollouts.png").exists() and "oracle (known physics)" in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "plan.mp4").exists(), "there is no decoder"


def test_each_figure_of_planning_is_that_of_its_controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is called an oracle knew the physics, what is called zero torque did nothing, and so on."""
    module, data = "jepa_lightning.probes.dynamics.planning", small_driven_data(test_size=4)
    probe = PlanningProbe(saved(tmp_path), planner=FEW, num_episodes=10, num_swing_ups=2)
    seen: list[Any] = []

    def no_run(world: Any, controller: Any, steps: int) -> SimpleNamespace:
        seen.append(controller)
        return SimpleNamespace(states=None)

    def known_distances(*_: Any) -> torch.Tensor:  # the n-th controller fails by 0.01 m in n of 10 episodes
        return torch.tensor([[0.26 if episode < len(seen) else 0.24, 0.0] for episode in range(10)])

    monkeypatch.setattr(f"{module}.run", no_run)
    monkeypatch.setattr(f"{module}.distances", known_distances)
    probe._trainer = SimpleNamespace(datamodule=data)
    figures, films = probe.reaching(data)
    assert films == [] and figures["episodes"] == 10
    controllers = {}
    for name in ("success", "one_plan", "zero_torque", "random_torque", "oracle", "noisy_oracle", "noisy_oracle_replanning"):
        failed = round(10 - 10 * figures[name])
        controllers[name] = seen[failed - 1]
        error = figures["standard_error"] if name == "success" else figures["standard_errors"][name]
        assert error == pytest.approx((figures[name] * (1 - figures[name]) / 10) ** 0.5)
        assert figures["at_radius"][name] == {"0.15": 0.0, "0.25": figures[name], "0.5": 1.0}
    assert len(set(map(id, controllers.values()))) == len(seen) == 7
    assert isinstance(controllers["zero_torque"], Zero) and isinstance(controllers["random_torque"], Random)
    for name, kind, every in (
        ("success", Imagination, 1),
        ("one_plan", Imagination, controllers["one_plan"].deadline),
        ("oracle", Oracle, controllers["oracle"].deadline),
        ("noisy_oracle", Oracle, controllers["noisy_oracle"].deadline),
        ("noisy_oracle_replanning", Oracle, 1),
    ):
        assert isinstance(controllers[name].look, kind) and controllers[name].every == every, name
    assert controllers["oracle"].look.noise == (0.0, 0.0)
    assert controllers["noisy_oracle"].look.noise == controllers["noisy_oracle_replanning"].look.noise == (0.05, 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_episodes": 0}, "model.num_episodes=0"),
        ({"goal": (2.0, 2.0)}, r"The tip cannot be at \(2.0, 2.0\)"),
        ({"goal": (0.0, -1.9)}, "the tip hangs within 0.25 m of it"),
    ],
)
def test_wrong_tasks_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).test(PlanningProbe(saved(tmp_path), **change), small_driven_data(), verbose=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "adam"}, "planner.method='adam': choose one of cem, mppi"),
        ({"cost": "first"}, "planner.cost='first': choose one of last, summed"),
        ({"num_iterations": 0}, "planner.num_iterations=0"),
        ({"num_elites": 301}, "choose 2 to num_samples=300"),
        ({"temperature": 0.0}, "planner.temperature=0.0"),
    ],
)
def test_wrong_planners_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Planner(**change)


def test_what_cannot_be_planned_or_decoded_is_refused(tmp_path: Path) -> None:
    for probe in (ImageDecoder, PlanningProbe):
        with pytest.raises(ValueError, match=f"without actions, and {probe.__name__} needs them"):
            probe(saved_free(tmp_path))
    with pytest.raises(ValueError, match="StateProbe evaluates forecasts of a free one"):
        StateProbe(saved(tmp_path))
    with pytest.raises(ValueError, match="data.stride=2: the report counts in frames"):
        trainer(tmp_path, max_epochs=1).fit(StateProbe(saved_free(tmp_path, stride=2)), small_data(stride=2))
    with pytest.raises(ValueError, match="model.embedding_source='both'"):
        ImageDecoder(saved(tmp_path), embedding_source="both")
    for change, message in (
        ({"stride": 1}, "trained on data.stride=5, and now data.stride=1"),
        ({"torque_limits": (5.0, 5.0)}, r"trained on data.torque_limits=\(10.0, 5.0\)"),
        ({"gravity": 1.6}, "trained on data.gravity=9.81, and now data.gravity=1.6"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path).test(PlanningProbe(saved(tmp_path)), small_driven_data(**change), verbose=False)
    with pytest.raises(ValueError, match="data's actions have 0 scalars"):
        trainer(tmp_path).test(PlanningProbe(saved(tmp_path)), small_driven_data(torque_limits=None), verbose=False)
