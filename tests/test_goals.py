"""Planning in any environment: starts are reached by replay, and each controller is evaluated on the same goals."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import record_points, small_dynamics, small_trajectories, trainer
from PIL import Image
from points import Knowing, Moving

from callbacks import LastCheckpoint
from datamodules import Collect, Trajectories
from datamodules.collecting import collect
from datamodules.environments import Environment, EnvironmentSettings
from datamodules.recordings import Episode, write_episode
from jepa_lightning import Planner
from jepa_lightning.probes import GoalProbe
from jepa_lightning.probes.dynamics.environment_world import EnvironmentWorld, check_replay, window_of
from jepa_lightning.probes.dynamics.goal_tasks import Once, draw_goals, goal_windows

FEW = Planner(num_samples=64, num_iterations=5, num_elites=8, num_further_iterations=3)


def saved(root: Path, data: Trajectories, **changes: Any) -> Path:
    model = small_dynamics(data, **changes)
    trainer(root, max_steps=2, enable_checkpointing=True, callbacks=[LastCheckpoint()]).fit(model, data)
    return root / "checkpoints" / "last.ckpt"


def knowing(probe: Any) -> Any:
    """Put the true encoder and dynamics into a probe's JEPA."""
    probe.jepa.target_encoder = probe.jepa.context_encoder = Knowing()
    probe.jepa.predictor = Moving()
    return probe


def report(probe: Any, data: Trajectories, root: Path) -> dict[str, Any]:
    trainer(root).test(probe, datamodule=data, verbose=False)
    return json.loads((root / "report.json").read_text())


@pytest.mark.parametrize("stride", [1, 2])
def test_a_model_that_knows_reaches_goals_and_each_baseline_does_what_it_says(
    tmp_path: Path, points_root: Path, stride: int
) -> None:
    data = small_trajectories(points_root, stride=stride, windows=3 if stride == 2 else 5, test_fraction=0.4)
    checkpoint = saved(tmp_path, data, horizon=1 if stride == 2 else 2, regularizer="variance_hinge")
    settings = {"offset": 4, "budget": 6, "radius": 0.2, "planner": FEW, "num_episodes": 12, "parallel": 5, "horizon": 3}
    found = report(knowing(GoalProbe(str(checkpoint), **settings)), data, tmp_path)["goals"]
    assert found["replay"]["success"] == 1.0, "the recorded actions lead to the recorded goal"
    assert found["world_model"]["success"] >= 0.9 and found["one_plan"]["success"] >= 0.9
    assert found["oracle"]["success"] >= 0.9
    assert found["zero"]["success"] == 0.0, "no episode starts at its goal, and zero actions do not move"
    assert found["random"]["success"] < 0.7 and found["untrained"]["success"] < 0.7
    for row in found.values():
        assert row["standard_error"] == pytest.approx((row["success"] * (1 - row["success"]) / 12) ** 0.5)
    assert (tmp_path / "goals.mp4").stat().st_size > 100
    text = (tmp_path / "report.md").read_text()
    assert "within 0.2 of its state" in text and "| the recorded actions | 1.00 (0.00) |" in text


@pytest.mark.parametrize("history", [1, 2])
def test_an_image_in_a_file_is_the_goal_of_all_episodes(tmp_path: Path, points_root: Path, history: int) -> None:
    data = small_trajectories(points_root, test_fraction=0.4, history=history)
    there = Environment(EnvironmentSettings("points:Points", image_size=16))
    there.reset(0)
    there.env.unwrapped.state = np.array([0.7, -0.7])  # type: ignore[attr-defined]
    Image.fromarray(there.frame()).save(tmp_path / "goal.png")
    arguments: dict[str, Any] = {"checkpoint": str(saved(tmp_path, data)), "goal_image": str(tmp_path / "goal.png")}
    probe = knowing(GoalProbe(**arguments, offset=6, num_episodes=6, parallel=4, planner=FEW))
    found = report(probe, data, tmp_path / "report")
    near = {name: row["nearness"] for name, row in found["goals"].items()}
    assert set(near) == {"world_model", "one_plan", "zero", "random", "untrained"}
    assert near["world_model"] < 0.1 and near["zero"] == pytest.approx(1) and near["random"] > 0.3
    assert found["task"]["goal_image"] == arguments["goal_image"]
    text = (tmp_path / "report" / "report.md").read_text()
    assert "embedding distance, last / first" in text and "the goal `" in text and "goals 6 frames ahead" not in text
    assert found["goals"]["world_model"]["success"] == 0  # this environment has no end


def test_a_goal_image_that_cannot_be_used_is_refused_before_an_episode(tmp_path: Path, points_root: Path) -> None:
    data = small_trajectories(points_root)
    checkpoint = str(saved(tmp_path, data))
    with pytest.raises(ValueError, match="no state is known of it, so leave out model.radius"):
        GoalProbe(checkpoint, goal_image="x.png", radius=0.1)
    (tmp_path / "bad.png").write_bytes(b"no image")
    for name in ("missing.png", "bad.png"):
        probe = GoalProbe(checkpoint, goal_image=str(tmp_path / name), offset=3)
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            trainer(tmp_path).test(probe, datamodule=data, verbose=False)
    both = small_trajectories(points_root, observation="both")
    probe = GoalProbe(str(saved(tmp_path / "both", both)), goal_image=str(tmp_path / "goal.png"), offset=3)
    with pytest.raises(ValueError, match="the model observes both, and an image has no vectors"):
        trainer(tmp_path).test(probe, datamodule=both, verbose=False)


def test_at_the_end_it_does_not_count_who_passed_by(tmp_path: Path, points_root: Path) -> None:
    probe = GoalProbe(str(saved(tmp_path, small_trajectories(points_root))), radius=0.1)
    probe._trainer = SimpleNamespace(datamodule=small_trajectories(points_root))
    goals = draw_goals(probe.data, 2, 2, lambda goal: False)
    ends = [goal.episode.states[goal.end] for goal in goals]
    world = SimpleNamespace(states=[[ends[0], ends[0] + 1], [ends[1] + 1, ends[1]]])
    assert probe.reached(world, goals) == [True, True]
    probe.at_end = True
    assert probe.reached(world, goals) == [False, True]
    probe.state_names = ["observation.1"]
    world.states[0][-1] = ends[0] + np.array([5, 0.05], np.float32)
    assert probe.reached(world, goals) == [True, True], "the other scalar does not count"


def test_the_environment_s_own_criterion_counts_without_a_radius(tmp_path: Path) -> None:
    data = small_trajectories(record_points(tmp_path / "recording", ends=True, episodes=30), test_fraction=0.3, windows=5)
    probe = GoalProbe(
        str(saved(tmp_path, data)), offset=2, budget=2, planner=FEW, num_episodes=6, baselines=["replay", "oracle"]
    )
    found = report(probe, data, tmp_path)["goals"]
    goals = draw_goals(data, 2, 6, lambda goal: False)
    ended = [np.abs(goal.episode.states[goal.start + 1 : goal.end + 1]).sum(axis=1).min() < 0.3 for goal in goals]
    assert found["replay"]["success"] == pytest.approx(np.mean(ended)) and "oracle" not in found


def test_starts_are_put_where_the_recording_was_and_goals_show_what_it_showed(points_root: Path) -> None:
    data = small_trajectories(points_root, history=2, observation="both", channels=1, test_fraction=0.4)
    goals = draw_goals(data, 3, 8, lambda goal: False)
    assert len({(goal.episode.name, goal.start) for goal in goals}) == 8
    names = {data.store.names[number] for number in data.episodes("test")}
    world = EnvironmentWorld(data, [Environment(EnvironmentSettings("points:Points", image_size=16)) for _ in goals])
    for number, goal in enumerate(goals):
        assert goal.episode.name in names and goal.end == goal.start + 3 and goal.start >= 1
        world.begin(number, goal.episode.seed, goal.episode.actions[: goal.start])
        assert np.array_equal(world.states[number][-1], goal.episode.states[goal.start])
    windows, vectors = goal_windows(data, goals)
    assert windows.shape == (8, 1, 2, 16, 16) and vectors.shape == (8, 1, 4)
    assert world.window().shape == windows.shape and world.vectors().shape == vectors.shape
    actions = torch.stack([torch.from_numpy(goal.episode.actions[goal.start : goal.end]) for goal in goals], dim=1) / 2
    for action in actions:
        world.act(action)
    assert torch.equal(world.window(), windows) and torch.equal(world.vectors(), vectors)


def test_what_is_seen_has_the_size_of_the_data_and_random_actions_are_held_as_recorded(tmp_path: Path) -> None:
    settings = EnvironmentSettings("points:Points", image_size=32)
    collect(Collect(settings, episodes=6, steps=8, hold=4, num_workers=1), tmp_path)
    data = small_trajectories(tmp_path, image_size=16, stride=2, windows=3)
    (goal,) = draw_goals(data, 4, 1, lambda goal: False)
    world = EnvironmentWorld(data, [Environment(settings)])
    world.begin(0, goal.episode.seed, goal.episode.actions[: goal.start])
    check_replay(world, 0, goal.episode, goal.start)
    assert world.window().shape == (1, 1, 3, 16, 16) and world.held == 2
    frames = data.store.frames[data.store.episode(data.store.names.index(goal.episode.name))]
    assert torch.equal((world.window()[0, 0] * 255).round().to(torch.uint8), frames[goal.start])


def test_a_last_action_that_leads_nowhere_is_no_goal_and_other_limits_are_refused(tmp_path: Path) -> None:
    root = record_points(tmp_path / "recording", steps=8)
    for path in sorted(root.glob("*.npz")):
        episode = dict(np.load(path))
        write_episode(root, Episode(path.name, **(episode | {"actions": np.pad(episode["actions"], ((0, 1), (0, 0)))})))
    data = small_trajectories(root)
    goals = draw_goals(data, 8, 1, lambda goal: False)
    assert [goal.end for goal in goals] == [8]
    with pytest.raises(ValueError, match="Only 0 of 1 starts"):
        draw_goals(data, 9, 1, lambda goal: False)
    checkpoint = saved(tmp_path, data)
    info = json.loads((root / "recording.json").read_text()) | {"action_low": None, "action_high": None}
    (root / "recording.json").write_text(json.dumps(info))
    other = small_trajectories(root)
    probe = GoalProbe(str(checkpoint), offset=2, num_episodes=1)
    probe.jepa.trained_on = {}
    with pytest.raises(ValueError, match="write action_low and action_high of the environment"):
        report(probe, other, tmp_path)


def test_frames_of_the_beginning_are_repeated() -> None:
    frames = [np.full((1, 2, 2), value, np.uint8) for value in (51, 102)]
    assert window_of(frames, 3)[0, :, 0, 0].tolist() == pytest.approx([0.2, 0.2, 0.4])


def test_an_environment_that_does_not_repeat_itself_is_refused(tmp_path: Path) -> None:
    data = small_trajectories(record_points(tmp_path / "noisy", noise=0.3), test_fraction=0.4)
    probe = GoalProbe(str(saved(tmp_path, data)), offset=4, num_episodes=8, planner=FEW, baselines=[])
    with pytest.raises(ValueError, match="the environment is in the state"):
        report(probe, data, tmp_path)


def test_an_episode_that_has_ended_stays_where_it_is(tmp_path: Path) -> None:
    data = small_trajectories(record_points(tmp_path, ends=True, episodes=30, steps=6), windows=3)
    environment = Environment(EnvironmentSettings("points:Points", {"ends": True}, image_size=16))
    world = EnvironmentWorld(data, [environment])
    world.begin(0, 1, np.zeros((0, 2)))
    environment.restore(np.array([0.7, 0.0]))
    left = torch.tensor([[-1.0, 0.0]])
    world.act(left)  # to 0.4
    assert not world.ended[0]
    world.act(left)  # to 0.1, which is the end
    assert world.ended[0] and world.rewards[0] == pytest.approx(-0.5)
    world.act(left)
    assert world.states[0][-1][0] == pytest.approx(0.1) and world.rewards[0] == pytest.approx(-0.5) and world.acted[0] == 2


def test_a_plan_for_the_end_does_not_reach_beyond_it(tmp_path: Path, points_root: Path) -> None:
    data = small_trajectories(points_root)
    settings = {"offset": 3, "budget": 5, "radius": 0.1, "baselines": ["one_plan"]}
    for at_end, deadline in ((True, 5), (False, None)):
        probe = GoalProbe(str(saved(tmp_path, data)), at_end=at_end, **settings)
        probe._trainer = SimpleNamespace(datamodule=data)
        found = probe.controllers(draw_goals(data, 3, 2, lambda goal: False))
        assert found["world_model"].deadline == deadline and found["world_model"].horizon == 3 == found["one_plan"].steps


def test_a_replay_is_compared_by_what_it_shows_too(points_root: Path) -> None:
    data = small_trajectories(points_root)
    (goal,) = draw_goals(data, 4, 1, lambda goal: False)
    world = EnvironmentWorld(data, [Environment(EnvironmentSettings("points:Points", image_size=16))])
    world.begin(0, goal.episode.seed, goal.episode.actions[:2])
    check_replay(world, 0, goal.episode, 2)
    with pytest.raises(ValueError, match="does not show what was recorded"):
        check_replay(world, 0, goal.episode._replace(frames=255 - goal.episode.frames), 2)


def test_the_first_plan_is_carried_out_to_its_end_and_no_further() -> None:
    world = SimpleNamespace(num_episodes=1, action_dim=2, num_choices=0)
    once = Once(lambda world, step: torch.full((1, 2), float(step + 1)), 2)
    assert [once(world, step)[0, 0].item() for step in range(4)] == [1.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"at_end": True}, "model.at_end=true needs a model.radius"),
        ({"offset": 0}, "model.offset=0"),
        ({"radius": 0.0}, "model.radius=0.0"),
        ({"offset": 40}, "Only 0 of 50 starts"),
        ({"radius": 0.1, "state": ["height"]}, r"model.state=\['height'\]: the recording has observation.0, observation.1"),
    ],
)
def test_wrong_tasks_are_refused(tmp_path: Path, points_root: Path, changes: Any, said: str) -> None:
    data = small_trajectories(points_root)
    checkpoint = saved(tmp_path, data)
    with pytest.raises(ValueError, match=said):
        report(GoalProbe(str(checkpoint), **changes), data, tmp_path)
