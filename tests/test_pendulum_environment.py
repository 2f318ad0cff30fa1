"""The double pendulum as an environment: the physics and the images of the data module, in gymnasium's protocol."""

import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from datamodules import Collect, Trajectories
from datamodules.collecting import collect
from datamodules.environments import Environment, EnvironmentSettings
from datamodules.physics import Pendulum, state_labels
from datamodules.rendering import render

NAME = "datamodules.pendulum_environment:DoublePendulum-v0"


def test_it_keeps_gymnasium_s_protocol() -> None:
    from gymnasium.utils.env_checker import check_env

    env = gymnasium.make(NAME, render_mode="rgb_array")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unbounded velocities
        check_env(env.unwrapped, skip_render_check=True)


def test_a_step_is_physics_and_an_image_is_the_data_module_s() -> None:
    env = Environment(EnvironmentSettings(NAME, {"image_size": 32}, image_size=None))
    env.reset(3)
    before = env.snapshot()
    env.act(np.array([1.0, -0.5], np.float32))
    torques = torch.tensor([[[10.0, -2.5]]], dtype=torch.float64)
    after = Pendulum().simulate(before[None], 2, torques)[0, -1]
    assert torch.allclose(env.snapshot(), after)
    assert np.allclose(env.state(), state_labels(after).float())
    drawn = (render(after.float(), 32, (1.0, 1.0), 3) * 255).round().to(torch.uint8).permute(1, 2, 0)
    assert np.array_equal(env.frame(), drawn.numpy())
    env.restore(before)
    assert torch.equal(env.snapshot(), before) and env.can_be_set


def test_the_reward_is_the_height_of_the_tip() -> None:
    env = gymnasium.make(NAME).unwrapped
    for state, height in (([0.0, 0.0, 0.0, 0.0], -1.0), ([np.pi, np.pi, 0.0, 0.0], 1.0)):
        env.reset(options={"state": state})
        assert env.step(np.zeros(2, np.float32))[1] == pytest.approx(height, abs=1e-3)


def test_a_model_can_be_trained_on_its_recording(tmp_path: Path) -> None:
    collect(Collect(EnvironmentSettings(NAME, image_size=32), episodes=4, steps=6, num_workers=1), tmp_path)
    data = Trajectories(str(tmp_path), history=2, windows=3)
    batch = data.first_clips(2, torch.device("cpu"))
    assert batch.observations.shape[1:] == (3, 6, 32, 32) and data.action_dim == 2
    starts = [data.store.table[data.store.episode(e), data.store.column("states")][0] for e in range(4)]
    assert len({tuple(start.tolist()) for start in starts}) == 4
