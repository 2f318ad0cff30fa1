"""Recording environments: the same seed gives the same recording, however it was made."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonargparse import ArgumentError

from datamodules import collecting
from datamodules.collecting import Collect, RandomHeld, collect
from datamodules.environments import Environment, EnvironmentSettings, resized
from datamodules.recordings import read
from jepa_lightning.cli import main
from jepa_lightning.collect_command import run_collect

POINTS = EnvironmentSettings("points:Points", image_size=16)


def settings(**changes: Any) -> Collect:
    return Collect(**({"environment": POINTS, "episodes": 4, "steps": 6, "num_workers": 1} | changes))


def contents(root: Path) -> dict[str, dict[str, Any]]:
    recording = read(root)
    return {name: recording.episode(number)._asdict() for number, name in enumerate(recording.names)}


def equal(first: dict[str, dict[str, Any]], second: dict[str, dict[str, Any]]) -> bool:
    return first.keys() == second.keys() and all(
        np.array_equal(first[name][field], second[name][field]) for name in first for field in first[name] if field != "name"
    )


def test_an_episode_is_what_the_environment_did(tmp_path: Path) -> None:
    collect(settings(), tmp_path)
    info = read(tmp_path).info
    assert info.action_low == [-2, -2] and info.action_high == [2, 2] and info.num_choices == 0
    assert list(info.state_names) == ["observation.0", "observation.1"]
    assert len(contents(tmp_path)) == 4
    for episode in contents(tmp_path).values():
        env = Environment(POINTS)
        env.reset(episode["seed"])
        assert episode["frames"].shape == (7, 16, 16, 3) and episode["actions"].shape == (6, 2)
        for t in range(7):
            assert np.array_equal(env.frame(), episode["frames"][t]) and np.array_equal(env.state(), episode["states"][t])
            if t < 6:
                assert env.act(episode["actions"][t]).reward == pytest.approx(episode["rewards"][t])
    seeds = [episode["seed"] for episode in contents(tmp_path).values()]
    assert len(set(seeds)) == 4


def test_a_share_of_the_limits_is_what_is_acted_and_recorded_with(tmp_path: Path) -> None:
    gentle = EnvironmentSettings("points:Points", image_size=16, action_share=0.25)
    collect(settings(environment=gentle, steps=40), tmp_path)
    info = read(tmp_path).info
    assert info.action_low == [-0.5, -0.5] and info.action_high == [0.5, 0.5]
    actions = np.concatenate([episode["actions"] for episode in contents(tmp_path).values()])
    assert 0.45 < np.abs(actions).max() <= 0.5
    assert Environment(gentle).own_action(np.array([1.0, -2.0])).tolist() == [0.5, -0.5]
    policy = {"policy": "points:leftwards", "policy_arguments": {"force": 1.0}}
    collect(settings(environment=gentle, **policy), tmp_path / "policy")
    for episode in contents(tmp_path / "policy").values():  # a policy keeps to it, too, and what is recorded was applied
        assert (episode["actions"] == [-0.5, 0]).all()
        moved = np.diff(episode["states"][:, 0])
        assert (np.isclose(moved, -0.075, atol=1e-6) | (episode["states"][1:, 0] == -1)).all()
    with pytest.raises(ValueError, match="holds a recording with action_share=0.25, and now action_share=1.0"):
        collect(settings(steps=40), tmp_path)
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"action_share={share}: give a share of the action limits in"):
            EnvironmentSettings("points:Points", action_share=share)
    with pytest.raises(ValueError, match="action_share=0.5: the actions of points:Points are discrete"):
        Environment(EnvironmentSettings("points:Points", {"choices": True}, action_share=0.5))


def test_a_recording_older_than_a_setting_was_made_with_its_default(tmp_path: Path) -> None:
    collect(settings(episodes=2), tmp_path)
    said = json.loads((tmp_path / "recording.json").read_text())
    assert said["environment"].pop("action_share") == 1.0
    (tmp_path / "recording.json").write_text(json.dumps(said))
    collect(settings(episodes=3), tmp_path)
    assert len(contents(tmp_path)) == 3


def test_a_state_is_found_in_a_dictionary_of_observations() -> None:
    env = Environment(EnvironmentSettings("points:Points", image_size=None, state=["place", "distance"]))
    env.reset(0)
    env.act(np.zeros(2))
    env.observation = {"place": np.array([3.0, 4.0]), "other": np.zeros(1)}
    state = env.state()
    assert state is not None and state[:2].tolist() == [3.0, 4.0] and len(state) == 3
    assert env.state_names() == ["place.0", "place.1", "distance"]


def test_several_processes_and_a_cut_give_the_same_recording(tmp_path: Path) -> None:
    collect(settings(), tmp_path / "one")
    collect(settings(num_workers=2), tmp_path / "two")
    assert not collecting._environments  # none is left open for what is forked later
    assert equal(contents(tmp_path / "one"), contents(tmp_path / "two"))
    kept = tmp_path / "one" / "episode_000002.npz"
    before, time = contents(tmp_path / "one"), kept.stat().st_mtime_ns
    for number in (1, 3):
        (tmp_path / "one" / f"episode_{number:06d}.npz").unlink()
    collect(settings(), tmp_path / "one")
    assert equal(contents(tmp_path / "one"), before) and kept.stat().st_mtime_ns == time
    collect(settings(episodes=5), tmp_path / "one")
    assert equal({k: v for k, v in contents(tmp_path / "one").items() if "4" not in k}, before)


def test_processes_are_spawned_because_windows_are_not_to_be_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[tuple[int, str]] = []

    class Noted(ThreadPoolExecutor):
        def __init__(self, workers: int, context: Any) -> None:
            pools.append((workers, context.get_start_method()))
            super().__init__(workers)

    monkeypatch.setattr(collecting, "ProcessPoolExecutor", Noted)
    assert sorted(collecting._results(abs, [0, 1, 2, 3], 3)) == [0, 1, 2, 3]
    assert pools == [(2, "spawn")]


def test_another_seed_gives_another_recording_and_is_refused_in_the_same_folder(tmp_path: Path) -> None:
    collect(settings(), tmp_path / "a")
    collect(settings(seed=1), tmp_path / "b")
    first, second = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert not any(np.array_equal(first[name]["actions"], second[name]["actions"]) for name in first)
    with pytest.raises(ValueError, match="holds a recording with seed=0, and now seed=1 is asked for"):
        collect(settings(seed=1), tmp_path / "a")


def test_actions_are_held_and_reach_both_limits() -> None:
    env = Environment(POINTS)
    policy = RandomHeld(env, 3, seed=0)
    actions = np.array([policy(None, {}) for _ in range(300)])
    changes = np.flatnonzero((np.diff(actions, axis=0) != 0).any(axis=1))
    assert set(np.diff(changes)) == {3}
    assert actions.min() < -1.8 and actions.max() > 1.8 and np.abs(actions).max() <= 2
    assert np.abs(actions.mean(axis=0)).max() < 0.4


def test_an_action_is_repeated_and_its_rewards_are_added(tmp_path: Path) -> None:
    repeated = EnvironmentSettings("points:Points", image_size=16, action_repeat=3)
    collect(settings(environment=repeated, episodes=1), tmp_path)
    (episode,) = contents(tmp_path).values()
    env = Environment(POINTS)
    env.reset(episode["seed"])
    for t in range(6):
        total = sum(env.act(episode["actions"][t]).reward for _ in range(3))
        assert total == pytest.approx(episode["rewards"][t], rel=1e-5)
        assert np.array_equal(env.state(), episode["states"][t + 1])


def test_discrete_actions_are_recorded_as_integers(tmp_path: Path) -> None:
    discrete = EnvironmentSettings("points:Points", {"choices": True}, image_size=16)
    collect(settings(environment=discrete, episodes=8), tmp_path)
    actions = np.concatenate([episode["actions"] for episode in contents(tmp_path).values()])
    assert actions.dtype == np.int64 and set(actions) == set(range(5)) and read(tmp_path).info.num_choices == 5
    env = Environment(discrete)
    env.reset(0)
    assert env.own_action(np.array([0, 0, 0, 1, 0])) == 3 and env.action_dim == 5


def test_a_policy_of_the_user_s_acts_until_it_says_the_end(tmp_path: Path) -> None:
    collect(settings(policy="points:leftwards", policy_arguments={"force": 0.5}, episodes=2), tmp_path)
    for episode in contents(tmp_path).values():
        assert episode["actions"].tolist() == [[-0.5, 0.0]] * 3 and len(episode["frames"]) == 4
    for policy in ("points:nobody", "nowhere:x", "nothing"):
        with pytest.raises(ValueError, match=rf"collect.policy='{policy}' cannot be imported"):
            collect(settings(policy=policy), tmp_path / "other")


def test_an_episode_ends_where_the_environment_ends_it(tmp_path: Path) -> None:
    ending = EnvironmentSettings("points:Points", {"ends": True}, image_size=16, state=["distance"])
    with pytest.raises(ValueError, match="points:Points has no such attribute, and its observation and info have"):
        collect(settings(environment=ending), tmp_path / "x")  # its info has it only after a step
    ending = EnvironmentSettings("points:Points", {"ends": True}, image_size=16, state=["state"])
    collect(settings(environment=ending, episodes=20, steps=60), tmp_path)
    ended = [episode for episode in contents(tmp_path).values() if len(episode["actions"]) < 60]
    assert ended and read(tmp_path).info.state_names == ["state.0", "state.1"]
    for episode in ended:
        distances = np.abs(episode["states"]).sum(axis=1)
        assert distances[-1] < 0.3 and (distances[1:-1] >= 0.3).all()


def test_only_numbers_are_a_vector_and_a_gray_image_is_a_frame() -> None:
    env = Environment(EnvironmentSettings("points:Points", image_size=None))
    env.reset(0)
    gray = np.arange(12, dtype=np.uint8).reshape(3, 4)
    env.observation = {"image": gray, "mission": "go there", "heading": 2, "place": np.array([0.5, 1.0])}
    assert np.array_equal(env.frame(), gray[..., None]) and env.vector().tolist() == [2.0, 0.5, 1.0]


def test_a_simulator_whose_state_is_an_image_cannot_be_set() -> None:
    env = Environment(POINTS)
    env.reset(0)
    assert env.can_be_set
    env.env.unwrapped.state = np.zeros((4, 4, 3), np.uint8)
    assert not env.can_be_set


def test_the_same_settings_with_a_tuple_are_the_same(tmp_path: Path) -> None:
    for value in ((0, 1), [0, 1]):
        same = EnvironmentSettings("points:Points", {"choices": False}, image_size=16, reset_options={"pair": value})
        collect(settings(environment=same, episodes=1), tmp_path)


def test_limits_other_than_ours_are_scaled_both_ways() -> None:
    env = Environment(POINTS)
    assert env.own_action(np.array([-1.0, 0.5])).tolist() == [-2, 1] and env.own_action(np.array([3.0, 0])).tolist() == [
        2,
        0,
    ]


def test_a_simulator_is_tried_out_and_put_back() -> None:
    env = Environment(POINTS)
    env.reset(0)
    before = env.snapshot()
    state = env.state()
    reached = env.try_out(before, [np.array([1.0, 0.0]), np.array([1.0, 0.0])])
    assert reached[0] == pytest.approx(min(state[0] + 0.6, 1), abs=1e-6) and reached[1] == pytest.approx(state[1])
    assert np.array_equal(env.env.unwrapped.state, before) and np.array_equal(env.state(), state) and env.can_be_set


def test_resizing_takes_the_mean_of_what_a_pixel_covers() -> None:
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    small = resized(image, (2, 3))
    assert small.shape == (2, 3, 3) and small[0, 0, 0] == pytest.approx(image[:2, :2, 0].mean(), abs=0.5)
    assert resized(image[..., :1], 2).shape == (2, 2, 1) and resized(image, None) is image


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"episodes": 0}, "collect.episodes=0"), ({"hold": 0}, "collect.hold=0"), ({"seed": -1}, "collect.seed=-1")],
)
def test_wrong_settings_are_refused(changes: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        settings(**changes)


def test_environments_that_cannot_be_made_are_explained() -> None:
    for name, said in (
        ("NoSuch-v0", "The environment NoSuch-v0 cannot be made"),
        ("nowhere:Env", "The environment nowhere:Env cannot be made: ModuleNotFoundError"),
    ):
        with pytest.raises(ValueError, match=said):
            Environment(EnvironmentSettings(name))
    for changes, said in (({"action_repeat": 0}, "action_repeat=0"), ({"image_size": 0}, "image_size=0")):
        with pytest.raises(ValueError, match=said):
            EnvironmentSettings("x", **changes)


def test_the_command_takes_the_configuration_of_a_training(tmp_path: Path, capsys: Any) -> None:
    config = tmp_path / "world.yaml"
    config.write_text(
        f"data:\n  class_path: Trajectories\n  init_args:\n    root: {tmp_path / 'there'}\n    collect:\n"
        "      environment: {id: 'points:Points', image_size: 16, arguments: {choices: true}}\n"
        "      episodes: 7\n      steps: 5\n"
    )
    main(["collect", "--config", str(config), "--episodes", "3", "--num_workers", "1"])
    assert "3 episodes are in" in capsys.readouterr().out
    found = contents(tmp_path / "there")
    assert len(found) == 3 and all(len(episode["actions"]) <= 5 for episode in found.values())
    assert read(tmp_path / "there").info.num_choices == 5


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    config = tmp_path / "world.yaml"
    config.write_text("data: {init_args: {root: x}}\n")
    with pytest.raises(ValueError, match="has no data.collect"):
        run_collect(["--config", str(config)])
    with pytest.raises(ValueError, match="Give the folder of the recording"):
        run_collect(["--environment.id", "points:Points"])
    with pytest.raises(ArgumentError):
        run_collect(["--root", str(tmp_path), "--episode", "3"])
