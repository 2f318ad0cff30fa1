"""What is fitted on a frozen world model: the next action towards a goal, and the reward of a step."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import record_points, small_trajectories, trainer
from test_goals import FEW, knowing, saved

from callbacks import LastCheckpoint
from datamodules.environments import Environment, EnvironmentSettings
from jepa_lightning.probes import GoalProbe, InverseModel, RewardProbe
from jepa_lightning.probes.dynamics.environment_world import EnvironmentWorld
from jepa_lightning.probes.dynamics.reward import Foresight


def test_an_inverse_model_learns_which_action_leads_to_a_goal(tmp_path: Path) -> None:
    data = small_trajectories(record_points(tmp_path / "r", episodes=40), batch_size=16, test_fraction=0.2)
    checkpoint = saved(tmp_path, data)
    model = knowing(InverseModel(str(checkpoint), width=64, learning_rate=3e-3))
    run = trainer(tmp_path / "inverse", max_epochs=60, limit_val_batches=1.0, enable_checkpointing=True)
    run.fit(model, data)
    assert run.callback_metrics["val/error_over_mean"] < 0.75
    now, goal = torch.zeros(1, 8), torch.zeros(1, 8)
    goal[0, 0] = 0.6
    action = model.eval().act(now, goal)
    assert action[0, 0] > 0.3 > abs(action[0, 1])
    assert (model.act(now, goal * 100).abs() <= 1).all()


def test_an_inverse_model_of_discrete_actions_chooses_one(tmp_path: Path) -> None:
    data = small_trajectories(record_points(tmp_path / "r", episodes=40, choices=True), batch_size=16)
    model = knowing(InverseModel(str(saved(tmp_path, data)), width=64, learning_rate=3e-3))
    trainer(tmp_path / "inverse", max_epochs=40, limit_val_batches=1.0).fit(model, data)
    goals = torch.nn.functional.pad(torch.tensor([[0.6, 0.0], [-0.6, 0.0], [0.0, 0.6], [0.0, -0.6]]), (0, 6))
    chosen = model.eval().act(torch.zeros(4, 8), goals)
    assert chosen.argmax(dim=1).tolist() == [1, 2, 3, 4] and chosen.sum(dim=1).tolist() == [1.0] * 4


def test_an_inverse_model_of_another_jepa_is_refused(tmp_path: Path, points_root: Path) -> None:
    data = small_trajectories(points_root)
    first, second = saved(tmp_path / "a", data), saved(tmp_path / "b", data, learning_rate=1e-2)
    run = trainer(tmp_path / "i", max_steps=1, enable_checkpointing=True, callbacks=[LastCheckpoint()])
    run.fit(InverseModel(str(first), width=8), data)
    inverse = str(tmp_path / "i" / "checkpoints" / "last.ckpt")
    assert GoalProbe(str(first), inverse=inverse).inverse is not None
    with pytest.raises(ValueError, match="was fitted on another JEPA"):
        GoalProbe(str(second), inverse=inverse)


def test_a_reward_head_is_learned_and_planned_for(tmp_path: Path) -> None:
    data = small_trajectories(record_points(tmp_path / "r", episodes=60), batch_size=16)
    probe = knowing(
        RewardProbe(
            str(saved(tmp_path, data)), width=64, learning_rate=3e-3, horizon=3, planner=FEW, num_episodes=4, frames=8
        )
    )
    probe.encoders["jepa"] = probe.jepa.target_encoder
    run = trainer(tmp_path, max_epochs=60, limit_val_batches=1.0)
    run.fit(probe, data)
    assert run.callback_metrics["val/r2"] > 0.9
    places = torch.nn.functional.pad(torch.tensor([[0.0, 0.0], [0.8, 0.8]]), (0, 6))
    center, corner = probe.eval().reward(places, torch.zeros(2, 2))
    assert center > corner + 0.6, "the reward is minus the distance from the center"
    trainer(tmp_path).test(probe, datamodule=data, verbose=False)
    found = json.loads((tmp_path / "report.json").read_text())["returns"]
    assert (
        found["world_model"]["return"] > found["zero"]["return"] + 2
        and found["world_model"]["return"] > found["random"]["return"]
    )
    assert (tmp_path / "return.mp4").stat().st_size > 100


def test_the_cost_of_foresight_is_minus_the_sum_of_predicted_rewards(tmp_path: Path, points_root: Path) -> None:
    data = small_trajectories(points_root)
    probe = knowing(RewardProbe(str(saved(tmp_path, data)), width=8)).eval()
    environment = Environment(EnvironmentSettings("points:Points", image_size=16))
    world = EnvironmentWorld(data, [environment])
    world.begin(0, 3, np.zeros((0, 2)))
    actions = torch.rand(1, 5, 3, 2) - 0.5
    costs = Foresight(probe)(world)(actions)
    for sample in range(5):
        features, total = probe.jepa.encode(world.window())[0, 0], 0.0
        for step in range(3):
            total -= probe.reward(features, actions[0, sample, step]).item()
            features = probe.jepa.predictor(features, actions[0, sample, step])
        assert costs[0, sample].item() == pytest.approx(total, rel=1e-4)


def test_data_without_rewards_is_refused(tmp_path: Path, points_root: Path) -> None:
    data = small_trajectories(points_root)
    checkpoint = saved(tmp_path, data)
    data.store.widths["rewards"] = 0
    with pytest.raises(ValueError, match="holds no rewards"):
        trainer(tmp_path, max_steps=1).fit(RewardProbe(str(checkpoint), width=8), data)
