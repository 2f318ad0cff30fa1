"""Collecting with the planner: where its plans lead, and that a seed is enough to repeat it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import record_points, small_dynamics, small_trajectories
from points import Knowing, Moving

from datamodules.collecting import Collect, collect
from datamodules.environments import Environment, EnvironmentSettings
from datamodules.recordings import Episode, read
from jepa_lightning import planned_policy
from jepa_lightning.cli import main
from jepa_lightning.planned_policy import Known, PlannedPolicy

POINTS = EnvironmentSettings("points:Points", image_size=16)


def knows(
    monkeypatch: pytest.MonkeyPatch, root: Path, place: tuple[float, float], stride: int = 1, history: int = 1
) -> None:
    """A model that knows the point, and a recording that shows it at one place only."""
    data = small_trajectories(root, stride=stride, windows=3, history=history)
    jepa = small_dynamics(data, horizon=1, regularizer="variance_hinge")
    jepa.target_encoder, jepa.predictor = Knowing(), Moving()
    env = Environment(POINTS)
    env.reset(0)
    env.env.unwrapped.state = np.array(place)
    frames = env.frame()[None].repeat(4, axis=0)
    episode = Episode("there", np.zeros((3, 2), np.float32), frames=frames)
    recording = SimpleNamespace(names=["there"], episode=lambda number: episode, info=read(root).info)
    monkeypatch.setattr(planned_policy, "known", lambda checkpoint: Known(jepa, recording, history, stride))


def acted(steps: int, **arguments: Any) -> tuple[Any, list[Any]]:
    """Where the point is after some steps of the policy, and its actions."""
    env = Environment(POINTS)
    env.reset(3)
    policy = PlannedPolicy(env.env, 5, "a checkpoint", **arguments)
    actions = []
    for _ in range(steps):
        actions.append(policy(env.observation, env.info))
        env.act(actions[-1])
    return env.state(), actions


@pytest.mark.parametrize(("stride", "history"), [(1, 1), (2, 1), (1, 2)])
def test_plans_lead_to_what_the_recording_shows(
    monkeypatch: pytest.MonkeyPatch, points_root: Path, stride: int, history: int
) -> None:
    for place in ((0.6, -0.5), (-0.4, 0.7)):
        knows(monkeypatch, points_root, place, stride, history)
        search = {"horizon": 6, "samples": 200, "iterations": 8}
        state, actions = acted(6 * stride, noise=0.0, **search)
        assert np.abs(state - place).max() < 0.15
        again, same = acted(6 * stride, noise=0.0, **search)
        assert np.array_equal(state, again) and np.array_equal(actions, same)
        assert all(action.dtype == np.float32 and action.shape == (2,) for action in actions)


def test_noise_is_added_within_the_limits(monkeypatch: pytest.MonkeyPatch, points_root: Path) -> None:
    knows(monkeypatch, points_root, (0.6, -0.5))
    plain, noisy = (np.stack(acted(5, noise=noise)[1]) for noise in (0.0, 0.5))
    assert 0.1 < np.abs(plain - noisy).mean() < 2 and np.abs(noisy).max() <= 2


def test_discrete_actions_are_chosen_one_at_a_time_and_sometimes_at_random(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = record_points(tmp_path, choices=True)
    jepa = small_dynamics(small_trajectories(root))
    monkeypatch.setattr(planned_policy, "known", lambda checkpoint: Known(jepa, read(root), 1, 1))
    chosen = {}
    for noise in (0.0, 1.0):
        env = Environment(EnvironmentSettings("points:Points", {"choices": True}, image_size=16))
        env.reset(3)
        policy = PlannedPolicy(env.env, 5, "a checkpoint", horizon=2, noise=noise, samples=8, iterations=1)
        chosen[noise] = [policy(env.observation, env.info) for _ in range(40)]
        assert set(chosen[noise]) <= set(range(5))
    assert len(set(chosen[1.0])) == 5 and chosen[0.0] != chosen[1.0]


def test_a_run_collects_the_next_recording(tmp_path: Path, points_root: Path) -> None:
    out = tmp_path / "run"
    small = ["--model.encoder_widths=[4]", "--model.horizon=1", "--model.latent_dim=8", "--model.regularizer=variance_hinge"]
    small += ["--model.regularizer_weights=null", "--data.windows=3", "--data.batch_size=2", "--data.stride=2"]
    run = ["--trainer.default_root_dir", str(out), "--trainer.accelerator", "cpu", "--trainer.max_steps", "1"]
    main(["fit", "--model", "DynamicsJEPA", "--data", "Trajectories", "--data.root", str(points_root), *small, *run])
    arguments = {"checkpoint": str(out), "horizon": 2, "samples": 8, "iterations": 1}
    settings = Collect(
        POINTS,
        episodes=2,
        steps=5,
        num_workers=1,
        policy="jepa_lightning.planned_policy:PlannedPolicy",
        policy_arguments=arguments,
    )
    torch.manual_seed(7)
    planned_policy.known.cache_clear()
    for name, workers in (("one", 1), ("two", 2)):
        collect(replace(settings, num_workers=workers), tmp_path / name)
    after = torch.rand(3)
    assert torch.equal(after, torch.rand(3, generator=torch.Generator().manual_seed(7)))  # later weights do not depend on it
    assert planned_policy.known(str(out)).stride == 2
    first, second = (read(tmp_path / name) for name in ("one", "two"))
    for number in range(2):
        assert np.array_equal(first.episode(number).actions, second.episode(number).actions)
    assert not np.array_equal(first.episode(0).actions, first.episode(1).actions)


def test_what_cannot_plan_is_refused(tmp_path: Path, points_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = small_trajectories(points_root)
    monkeypatch.setattr(planned_policy, "load", lambda checkpoint: small_dynamics(data))
    with pytest.raises(ValueError, match="The recording of elsewhere is not known"):
        planned_policy.known("elsewhere")
    blind = small_dynamics(small_trajectories(points_root, observation="vectors"), encoder_widths=None)
    monkeypatch.setattr(planned_policy, "load", lambda checkpoint: blind)
    with pytest.raises(ValueError, match="elsewhere holds a DynamicsJEPA: a world model of images, with actions"):
        planned_policy.known("elsewhere")
    for name, value in (("horizon", 0), ("samples", 1), ("iterations", 0), ("noise", -0.1), ("noise", float("nan"))):
        with pytest.raises(ValueError, match=f"collect.policy_arguments: {name}={value}: give"):
            PlannedPolicy(None, 0, "elsewhere", **{name: value})


def test_a_model_of_another_environment_is_refused(monkeypatch: pytest.MonkeyPatch, points_root: Path) -> None:
    jepa = small_dynamics(small_trajectories(points_root))
    env = Environment(EnvironmentSettings("points:Points", {"choices": True}, image_size=16))
    monkeypatch.setattr(planned_policy, "known", lambda checkpoint: Known(jepa, read(points_root), 1, 1))
    with pytest.raises(ValueError, match=r"plans 2 scalars of 1 action\(s\) with 0 choices, and the environment takes 5"):
        PlannedPolicy(env.env, 0, "elsewhere")


def test_damaged_and_empty_episodes_are_no_goals(monkeypatch: pytest.MonkeyPatch, points_root: Path) -> None:
    knows(monkeypatch, points_root, (0.6, -0.5))
    known = planned_policy.known("")
    good = known.recording.episode(0)

    def episode(number: int) -> Episode:
        if number == 0:
            raise ValueError("damaged")
        return good if number == 1 else good._replace(frames=None)

    recording = SimpleNamespace(names=list("abcd"), episode=episode, info=known.recording.info)
    monkeypatch.setattr(planned_policy, "known", lambda checkpoint: known._replace(recording=recording))
    state, _ = acted(6, noise=0.0, horizon=6, samples=200, iterations=8)
    assert np.abs(state - (0.6, -0.5)).max() < 0.15
    recording.names = ["a"]
    with pytest.raises(ValueError, match="No episode of the recording of the model has frames"):
        acted(1)


def test_what_was_seen_before_and_before_the_goal_fills_the_history(
    monkeypatch: pytest.MonkeyPatch, points_root: Path
) -> None:
    data = small_trajectories(points_root, history=2)
    jepa, recording = small_dynamics(data), read(points_root)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    plan = jepa.plan
    monkeypatch.setattr(jepa, "plan", lambda now, goal, *rest: seen.append((now, goal)) or plan(now, goal, *rest))
    monkeypatch.setattr(planned_policy, "known", lambda checkpoint: Known(jepa, recording, 2, 1))
    threads = torch.get_num_threads()
    env = Environment(POINTS)
    env.reset(3)
    policy = PlannedPolicy(env.env, 5, "a checkpoint", horizon=1, samples=8, iterations=1)
    frames = []
    for _ in range(4):
        frames.append(env.frame())
        env.act(policy(env.observation, env.info))
    as_frames = [(255 * now).round().byte().unflatten(1, (2, 3))[0].permute(0, 2, 3, 1).numpy() for now, _ in seen]
    assert np.array_equal(as_frames[0], np.stack([frames[0], frames[0]]))
    for step in range(1, 4):
        assert np.array_equal(as_frames[step], np.stack(frames[step - 1 : step + 1]))
    every = [recording.episode(number).frames for number in range(len(recording.names))]
    for _, goal in seen:
        before, last = (255 * goal).round().byte().unflatten(1, (2, 3))[0].permute(0, 2, 3, 1).numpy()
        places = [(n, t) for n, shown in enumerate(every) for t in range(len(shown)) if np.array_equal(shown[t], last)]
        assert any(np.array_equal(every[n][max(0, t - 1)], before) for n, t in places)
    assert torch.get_num_threads() == threads
