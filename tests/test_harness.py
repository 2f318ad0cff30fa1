"""The adapter for stable-worldmodel, asked as its planners ask, without the package."""

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_dynamics, small_trajectories

from jepa_lightning import harness
from jepa_lightning.harness import BoxScaler, JEPACost
from jepa_lightning.planner import latent_cost
from jepa_lightning.recorded_starts import RecordedStarts


def frames(count: int, seed: int = 0) -> torch.Tensor:
    """(E, 1, 16, 16, 3) uint8."""
    return torch.randint(0, 256, (count, 1, 16, 16, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def as_solver(info: dict[str, torch.Tensor], samples: int) -> dict[str, Any]:
    """What their CEM makes of an info: each tensor (E, ...) seen (E, N, ...)."""
    return {name: value.unsqueeze(1).expand(len(value), samples, *value.shape[1:]) for name, value in info.items()}


def test_costs_are_distances_of_roll_outs_from_the_goal(points_root: Path) -> None:
    jepa = small_dynamics(small_trajectories(points_root))
    torch.nn.init.normal_(jepa.predictor.change[-1].weight, std=0.1)
    pixels, goals = frames(3), frames(3, 1)
    info = as_solver({"pixels": pixels, "goal": goals}, 6)
    candidates = 3 * torch.rand(3, 6, 4, 2) - 1.5
    costs = JEPACost(jepa).get_cost(info, candidates)
    start, goal = (jepa.encode(of.permute(0, 1, 4, 2, 3).float() / 255)[:, 0] for of in (pixels, goals))
    expected = latent_cost(jepa.predictor, start, goal, "last")(candidates.clamp(-1, 1))
    assert costs.shape == (3, 6) and torch.allclose(costs, expected)
    summed = JEPACost(jepa, "summed").criterion(as_solver({"pixels": pixels, "goal": goals}, 6), candidates)
    assert not torch.allclose(costs, summed)


def test_an_image_is_encoded_once_a_plan(points_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = JEPACost(small_dynamics(small_trajectories(points_root)))
    calls: list[int] = []
    encode = cost.jepa.encode
    monkeypatch.setattr(cost.jepa, "encode", lambda *given: calls.append(1) or encode(*given))
    info = as_solver({"pixels": frames(2), "goal": frames(2, 1)}, 4)
    for _ in range(5):
        cost.get_cost(info, torch.zeros(2, 4, 3, 2))
    assert len(calls) == 2
    with pytest.raises(ValueError, match="No goal image"):
        cost.get_cost({"pixels": frames(2)}, torch.zeros(2, 4, 3, 2))


def test_recent_frames_fill_the_history_and_one_is_repeated(points_root: Path) -> None:
    jepa = small_dynamics(small_trajectories(points_root, history=3))
    cost = JEPACost(jepa)
    several = torch.cat([frames(2, seed) for seed in range(3)], dim=1)  # (E, F, H, W, C)
    windows = several.permute(0, 1, 4, 2, 3).flatten(1, 2).float() / 255
    assert torch.allclose(cost._encode(several[:, None]), jepa.encode(windows[:, None])[:, 0])
    still = several[:, -1:].expand(-1, 3, -1, -1, -1)
    assert torch.allclose(cost._encode(several[:, None, -1:]), cost._encode(still[:, None]))
    info = as_solver({"pixels": several[:, -1:], "recent": several, "goal": frames(2, 5)}, 4)
    cost.get_cost(info, torch.zeros(2, 4, 2, 2))
    assert torch.allclose(info["jepa"][0], cost._encode(several[:, None]))


def test_limits_become_one_and_what_exceeds_them_is_cut() -> None:
    scaler = BoxScaler([0.0, -2.0], [4.0, 2.0])
    assert scaler.transform(np.array([[4.0, 0.0]], np.float32)).tolist() == [[1.0, 0.0]]
    assert scaler.inverse_transform(np.array([[-3.0, 0.5]], np.float32)).tolist() == [[0.0, 1.0]]


def test_starts_and_goals_are_held_out_and_far_apart_if_asked(points_root: Path) -> None:
    data = small_trajectories(points_root, test_fraction=0.4)
    starts = RecordedStarts(data)
    episodes, frames_of = starts.tasks(8, 4, 0.5, seed=0)
    assert len(set(zip(episodes, frames_of, strict=True))) == 8
    assert (episodes, frames_of) == starts.tasks(8, 4, 0.5, seed=0) != starts.tasks(8, 4, 0.5, seed=1)
    for episode, start in zip(episodes, frames_of, strict=True):
        (chunk,) = starts.load_chunk([episode], [start], [start + 5])
        assert chunk["pixels"].shape == (5, 3, 16, 16) and chunk["state"].shape == (5, 2)
        assert np.linalg.norm(chunk["state"][0] - chunk["state"][-1]) > 0.5
        whole = data.store.table[data.store.episode(data.episodes("test")[episode]), data.store.column("states")]
        assert np.array_equal(whole[start : start + 5].numpy(), chunk["state"])
    for episode, start in zip(*starts.tasks(4, 4, 0.5, seed=0, of=(1,)), strict=True):  # of one scalar, the other may stay
        (chunk,) = starts.load_chunk([episode], [start], [start + 5])
        assert abs(chunk["state"][0, 1] - chunk["state"][-1, 1]) > 0.5
    with pytest.raises(ValueError, match="starts have a goal 10 steps ahead"):
        starts.tasks(20, 10, 0.0, seed=0)


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ModuleType:
        raise ImportError(name)

    monkeypatch.setattr(harness.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r'pip install "jepa-lightning\[swm\]"'):
        harness.stable_worldmodel()


def test_a_policy_of_the_package_acts_within_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    class Far:
        def __init__(self, seed: int, action_noise: float) -> None:
            self.far = seed * action_noise

        def set_env(self, env: Any) -> None:
            self.env = env

        def get_action(self, info: dict[str, Any]) -> Any:
            return np.array([self.far, -0.5 + info["shift"]])

    monkeypatch.setattr(harness, "stable_worldmodel", lambda module: SimpleNamespace(Far=Far))
    env = SimpleNamespace(action_space=SimpleNamespace(low=np.array([-1.0, -1.0]), high=np.array([1.0, 1.0])))
    act = harness.expert(env, 3, ".module:Far", action_noise=2.0)
    assert act(None, {"shift": 0.25}).tolist() == [1.0, -0.25]


def test_a_policy_that_knows_only_vectors_of_environments_is_shown_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Vector:
        def __init__(self, seed: int) -> None:
            self.seed = seed

        def set_env(self, env: Any) -> None:
            self.env = env

        def get_action(self, info: dict[str, Any]) -> Any:
            actions = np.zeros(self.env.action_space.shape)
            for row, env in enumerate(self.env.envs):
                actions[row] = self.seed * env.step_size
            return actions

    monkeypatch.setattr(harness, "stable_worldmodel", lambda module: SimpleNamespace(Vector=Vector))
    space = SimpleNamespace(low=np.array([-1.0, -1.0]), high=np.array([1.0, 1.0]))
    env = SimpleNamespace(action_space=space, spec="spec", step_size=np.array([0.25, 1.0]))
    assert harness.expert(env, 2, ".module:Vector", lifted=True)(None, {}).tolist() == [0.5, 1.0]
    spread = harness.expert(env, 2, ".module:Vector", lifted=True, spread=2)
    assert [spread(None, {}).tolist() for _ in range(2)] == 2 * [[0.25, 0.5]]
    env.step_size = np.array([1.0, -0.25])
    assert spread(None, {}).tolist() == [0.5, -0.25]
    env.step_size = np.array([0.5, 0.5])
    assert spread(None, {}).tolist() == [0.5, -0.25], "an action is applied to its end before the next is chosen"
    assert spread(None, {}).tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="collect.policy_arguments: spread=0: give an integer of at least 1"):
        harness.expert(env, 2, ".module:Vector", lifted=True, spread=0)


def test_random_actions_keep_to_the_share_of_the_limits_that_was_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    class RandomPolicy:
        def __init__(self, seed: int) -> None:
            self.seed = seed

        def get_action(self, info: Any) -> Any:
            return np.array([[1.0, -self.seed]])

    monkeypatch.setattr(harness, "stable_worldmodel", lambda module: SimpleNamespace(RandomPolicy=RandomPolicy))
    assert harness.random_policy(3, 0.25).get_action({}).tolist() == [[0.25, -0.75]]


class FakePackage:
    """What `evaluate` uses of stable-worldmodel: it notes what it is given, and three of four episodes succeed."""

    def __init__(self) -> None:
        noted: dict[str, Any] = {}
        self.noted = noted

        class World:
            def __init__(self, environment: str, **settings: Any) -> None:
                noted["world"] = (environment, settings)

            def set_policy(self, policy: Any) -> None:
                noted["policy"] = policy

            def evaluate(self, **settings: Any) -> dict[str, list[bool]]:
                noted["evaluate"] = settings
                return {"episode_successes": [number % 4 != 0 for number in range(len(settings["episodes_idx"]))]}

        class Policy:
            def __init__(self, *given: Any, **named: Any) -> None:
                self.given, self.named = given, named

            def get_action(self, info: dict[str, Any], **_: Any) -> Any:
                return info

        self.World, self.WorldModelPolicy, self.RandomPolicy, self.PlanConfig = World, Policy, Policy, dict
        self.solver = SimpleNamespace(CEMSolver=lambda cost, **settings: (cost, settings))


def test_the_package_is_given_what_was_asked_for(points_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = FakePackage()
    monkeypatch.setattr(harness, "stable_worldmodel", lambda module="": package)
    data = small_trajectories(points_root, test_fraction=0.4, stride=2)
    cost = JEPACost(small_dynamics(data))
    task = {"episodes": 8, "offset": 4, "budget": 6, "far": 0.2, "seed": 3}
    found = harness.evaluate(
        data, "swm/Points", cost, history=2, samples=9, iterations=7, elites=5, horizon=4, setters=["set"], **task
    )
    assert found["success"] == 0.75 and found["standard_error"] == pytest.approx((0.75 * 0.25 / 8) ** 0.5)
    settings = {"num_envs": 8, "image_shape": (16, 16), "max_episode_steps": 60, "image_resample": "box"}
    assert package.noted["world"] == ("swm/Points", settings)
    asked = package.noted["evaluate"]
    chosen, begins = RecordedStarts(data).tasks(8, 4, 0.2, 3)
    assert isinstance(asked.pop("dataset"), RecordedStarts)
    assert asked == {
        "episodes_idx": chosen,
        "start_steps": begins,
        "goal_offset": 4,
        "eval_budget": 6,
        "callables": ["set"],
    }
    policy = package.noted["policy"]
    solver, config = policy.given
    search = {"batch_size": 8, "num_samples": 9, "var_scale": 1, "n_steps": 7, "topk": 5, "seed": 3}
    assert solver == (cost, search) and config == {"horizon": 4, "receding_horizon": 4, "action_block": 2}
    scaler, info = policy.named["process"]["action"], data.store.info
    assert scaler.inverse_transform(np.array([[-1.0, 1.0]])).tolist() == [[info.action_low[0], info.action_high[1]]]
    pixels = np.arange(5)[None, :, None] * np.ones((2, 1, 3))  # (E, T, ...): the newest of five steps is 4
    for step in range(3):
        seen = policy.get_action({"pixels": pixels + step, "goal": "as it is"})
        assert seen["goal"] == "as it is"
    assert seen["recent"][:, :, 0].tolist() == [[5, 6], [5, 6]], "the newest of the last two steps, oldest first"
    harness.evaluate(data, "swm/Points", None, setters=[], **task)
    assert package.noted["policy"].named == {"seed": 3}
    monkeypatch.setattr(harness, "random_policy", lambda *given: given)
    data.store.info.environment["action_share"] = 0.25
    harness.evaluate(data, "swm/Points", None, setters=[], **task)
    assert package.noted["policy"] == (3, 0.25)


def test_the_report_is_about_what_was_asked_and_says_which_command_made_it(
    points_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jepa = small_dynamics(small_trajectories(points_root))
    known = {"init_args": {"root": str(points_root), "windows": 3, "collect": {"episodes": 3}}}
    asked: list[dict[str, Any]] = []

    def evaluate(data: Any, environment: str, model: Any, **arguments: Any) -> dict[str, float]:
        asked.append({"root": data.root, "environment": environment, "model": model} | arguments)
        return {"success": 0.75 if model else 0.25, "standard_error": 0.1, "seconds": 3.2}

    monkeypatch.setattr(harness, "load", lambda path: jepa)
    monkeypatch.setattr(harness, "data_of", lambda path: known)
    monkeypatch.setattr(harness, "evaluate", evaluate)
    monkeypatch.setattr("sys.argv", ["harness.py", "a run", "--far", "2"])
    task: dict[str, Any] = {"episodes": 7, "offset": 3, "budget": 5, "far": 2, "far_of": (1,), "seed": 6}
    harness.main(str(tmp_path), "swm/Points", samples=9, horizon=4, **task)
    assert [type(one.pop("model")) for one in asked] == [JEPACost, type(None)]
    search = {"samples": 9, "iterations": 30, "elites": 30, "horizon": 4}
    expected = {"root": str(points_root), "environment": "swm/Points", "history": jepa.history} | task | search
    assert asked == [expected, expected]
    text = (tmp_path / "harness" / "report.md").read_text()
    assert "| world model | 0.75 | 0.10 | 3 |\n| random | 0.25 |" in text and "`World.evaluate`" in text
    assert "Made by `python -m jepa_lightning.harness 'a run' --far 2`." in text
    report = json.loads((tmp_path / "harness" / "report.json").read_text())
    assert report["world_model"]["success"] == 0.75 and report["task"] == task | {"far_of": [1]}
    assert report["search"] == search | {"cost": "last"} and report["checkpoint"] == str(tmp_path)
    with pytest.raises(ValueError, match="The data of .* is not known"):
        monkeypatch.setattr(harness, "data_of", lambda path: None)
        harness.main(str(tmp_path))
    with pytest.raises(ValueError, match="holds a Linear, not a world model"):
        monkeypatch.setattr(harness, "load", lambda path: torch.nn.Linear(1, 1))
        harness.main(str(tmp_path))
