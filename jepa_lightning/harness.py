"""Plan inside of stable-worldmodel, with its solvers and by its evaluation: the only module that imports it.

    python -m jepa_lightning.harness RUN --environment swm/TwoRoom-v1 --offset 25 --budget 50

The package (0.1.1, extra `swm`) lifts environments into dictionaries of arrays (E, 1, ...), and its planners ask a model for
the cost of action sequences: `get_cost(info, candidates)`. Shapes: E episodes, N sampled sequences, H steps, K environment
steps in a step of the model, A scalars of an action, D embedding dimension.
"""

import importlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from numpy.typing import NDArray
from torch import Tensor, nn

from datamodules.trajectories import Trajectories
from jepa_lightning.latent_dynamics import LatentDynamics
from jepa_lightning.planner import CostName, latent_cost
from jepa_lightning.probes.report import save_report
from jepa_lightning.recorded_starts import RecordedStarts
from jepa_lightning.weights.loading import load
from jepa_lightning.weights.runs import data_of

NEEDED = 'stable-worldmodel is missing: pip install "jepa-lightning[swm]".'

SETTERS = [
    {"method": "_set_state", "args": {"state": {"value": "state", "in_dataset": True}}},
    {"method": "_set_goal_state", "args": {"goal_state": {"value": "goal_state", "in_dataset": True}}},
]
"""How TwoRoom and PushT are put at the start and given the goal; both keep their state under "state"."""


def stable_worldmodel(module: str = "") -> Any:
    """The package, or one of its modules. Raises a ValueError that says how to install it if it is missing."""
    try:
        importlib.import_module("stable_worldmodel")
        return importlib.import_module(f"stable_worldmodel{module}")
    except ImportError as error:
        raise ValueError(f"{NEEDED} ({error})") from error


def expert(
    env: Any, seed: int, policy: str, lifted: bool = False, spread: int = 1, **arguments: Any
) -> Callable[[Any, dict[str, Any]], Any]:
    """A policy of stable-worldmodel as `datamodules.Collect` takes it.

    Args:
        env: The environment.
        seed: Seed of an episode.
        policy: Import path in the package, such as ".envs.two_room.expert_policy:ExpertPolicy".
        lifted: Whether the policy knows only vectors of environments, as PushT's does: it is shown a vector of one.
        spread: Number of steps over which each action is spread: a share of it is applied as often, so that what jumps at
            random moves smoothly.
        arguments: Further arguments of the policy, such as its noise.

    Returns:
        A function of observation and info that chooses actions, cut at the environment's limits.

    Raises:
        ValueError: `spread` is below 1.
    """
    if spread < 1:
        raise ValueError(f"collect.policy_arguments: spread={spread}: give an integer of at least 1.")
    module, _, name = policy.rpartition(":")
    chooser = getattr(stable_worldmodel(module), name)(seed=seed, **arguments)
    low, high = env.action_space.low, env.action_space.high
    if lifted:
        chooser.set_env(SimpleNamespace(envs=[env], spec=env.spec, action_space=SimpleNamespace(shape=(1, *low.shape))))
    else:
        chooser.set_env(env)

    left: list[Any] = []

    def choose(observation: Any, info: dict[str, Any]) -> Any:
        if not left:
            chosen = chooser.get_action(info)[0] if lifted else chooser.get_action(info)
            # What exceeds the limits is cut here, as the environments do: it should be recorded as it was applied.
            left.extend(np.clip(chosen, low, high) / spread for _ in range(spread))
        return left.pop()

    return choose


class JEPACost(nn.Module):
    """A world model as stable-worldmodel's planners use one (its `Costable`).

    Its actions are in [-1, 1], see `BoxScaler`; what a planner samples beyond is cut.

    Args:
        jepa: An action-conditioned world model of pixels.
        cost: "last" takes the distance from the goal at the last step, "summed" that at all steps.
    """

    def __init__(self, jepa: LatentDynamics, cost: CostName = "last") -> None:
        super().__init__()
        self.jepa, self.kind = jepa.eval().requires_grad_(False), cost

    def _encode(self, pixels: Tensor) -> Tensor:
        """Frames (E, N, F, H, W, C) uint8, all samples alike and F at most the history, the oldest repeated: (E, D)."""
        frames = pixels[:, 0].permute(0, 1, 4, 2, 3).float() / 255  # (E, F, C, H, W)
        missing = self.jepa.history - frames.shape[1]
        frames = torch.cat([frames[:, :1].expand(-1, missing, -1, -1, -1), frames], dim=1)
        return self.jepa.encode(frames.flatten(1, 2)[:, None])[:, 0]

    def get_cost(self, info: dict[str, Any], candidates: Tensor) -> Tensor:
        """Cost of candidates (E, N, H, K * A): (E, N).

        Args:
            info: "pixels" and "goal", (E, N, 1, H, W, C) uint8, and "recent" in the place of pixels if it is there.
            candidates: Actions, K of the environment's a step.

        Raises:
            ValueError: There is no goal.
        """
        if "goal" not in info:
            raise ValueError("No goal image: use World.evaluate(dataset=...), or an environment whose info has a goal.")
        if "jepa" not in info:  # a solver passes the same dictionary in every round of a plan
            info["jepa"] = self._encode(info.get("recent", info["pixels"])), self._encode(info["goal"])
        start, goal = info["jepa"]
        return latent_cost(self.jepa.predictor, start, goal, self.kind)(candidates.clamp(-1, 1))

    criterion = get_cost


class BoxScaler:
    """The limits of an action space become -1 and 1 (stable-worldmodel's `Transformable` for actions).

    Args:
        low: Lower limits, (A,).
        high: Upper limits, (A,).
    """

    def __init__(self, low: Any, high: Any) -> None:
        low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
        self.middle, self.half = (high + low) / 2, (high - low) / 2

    def transform(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """From the environment's units."""
        return (x - self.middle) / self.half

    def inverse_transform(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Into the environment's units."""
        return np.clip(x, -1, 1) * self.half + self.middle


def recent_frames_policy(solver: Any, config: Any, scaler: BoxScaler, history: int) -> Any:
    """The package's planning policy, which also remembers the last frames: its `info` has only the newest."""

    class RecentFrames(stable_worldmodel(".policy").WorldModelPolicy):  # type: ignore[misc]
        def get_action(self, info_dict: dict[str, Any], **kwargs: Any) -> Any:
            frames = self.__dict__.setdefault("frames", deque(maxlen=history))
            frames.append(info_dict["pixels"][:, -1:].copy())
            return super().get_action({**info_dict, "recent": np.concatenate(list(frames), axis=1)}, **kwargs)

    return RecentFrames(solver, config, process={"action": scaler})


def random_policy(seed: int, share: float) -> Any:
    """The package's random policy within the share of the limits that the recording, and so the planner, keeps to."""

    class Gentle(stable_worldmodel(".policy").RandomPolicy):  # type: ignore[misc]
        def get_action(self, *args: Any, **kwargs: Any) -> Any:
            return share * super().get_action(*args, **kwargs)

    return Gentle(seed=seed)


def evaluate(
    data: Trajectories,
    environment: str,
    cost: nn.Module | None,
    *,
    episodes: int = 100,
    offset: int = 25,
    budget: int = 50,
    far: float = 0.0,
    far_of: Sequence[int] = (0, 1),
    history: int = 1,
    samples: int = 300,
    iterations: int = 30,
    elites: int = 30,
    horizon: int = 5,
    seed: int = 0,
    setters: Any = SETTERS,
) -> dict[str, float]:
    """Success of a policy in the package's own `World.evaluate`, on held-out starts and goals.

    Args:
        data: Recorded episodes, of whose test episodes starts and goals are taken.
        environment: Id of the environment.
        cost: World model that its CEM plans with, or None for random actions within the recording's limits.
        episodes: Number of episodes E.
        offset: Steps from the start to the goal in the recording.
        budget: Steps that an episode may take.
        far: Distance that start and goal exceed; 0 for all.
        far_of: Numbers of the scalars of the state whose distance that is.
        history: Frames of a window of the model.
        samples: Number of samples N a round.
        iterations: Number of rounds of a plan.
        elites: Number of elites.
        horizon: Steps of a plan, which are all carried out before the next.
        seed: Seed of starts and planner.
        setters: How the environment is put at the start and given its goal, see `World.evaluate`.

    Returns:
        "success", its binomial "standard_error", "seconds".
    """
    swm = stable_worldmodel()
    assert data.image_size is not None
    size = (data.image_size,) * 2 if isinstance(data.image_size, int) else data.image_size
    world = swm.World(environment, num_envs=episodes, image_shape=size, max_episode_steps=10 * budget, image_resample="box")
    if cost is None:
        policy = random_policy(seed, float(data.store.info.environment.get("action_share", 1)))
    else:
        solver = swm.solver.CEMSolver(
            cost, batch_size=episodes, num_samples=samples, var_scale=1, n_steps=iterations, topk=elites, seed=seed
        )
        config = swm.PlanConfig(horizon=horizon, receding_horizon=horizon, action_block=data.stride)
        scaler = BoxScaler(data.store.info.action_low, data.store.info.action_high)
        policy = recent_frames_policy(solver, config, scaler, history)
    world.set_policy(policy)
    starts = RecordedStarts(data)
    chosen, begins = starts.tasks(episodes, offset, far, seed, far_of)
    began = time.monotonic()
    result = world.evaluate(
        dataset=starts, episodes_idx=chosen, start_steps=begins, goal_offset=offset, eval_budget=budget, callables=setters
    )
    success = float(np.mean(result["episode_successes"]))
    error = math.sqrt(success * (1 - success) / episodes)
    return {"success": success, "standard_error": error, "seconds": time.monotonic() - began}


def main(
    checkpoint: str,
    environment: str = "swm/TwoRoom-v1",
    root: str | None = None,
    episodes: int = 100,
    offset: int = 25,
    budget: int = 50,
    far: float = 0.0,
    far_of: tuple[int, ...] = (0, 1),
    samples: int = 300,
    iterations: int = 30,
    elites: int = 30,
    horizon: int = 5,
    cost: CostName = "last",
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate a world model in stable-worldmodel's harness, next to random actions; writes into RUN/harness.

    Args:
        checkpoint: Run directory, or a checkpoint in one.
        environment: Id of the environment.
        root: Recording that starts and goals are taken from; that of the run by default.
        episodes: Number of episodes.
        offset: Steps from the start to the goal in the recording.
        budget: Steps that an episode may take.
        far: Distance of states that start and goal exceed; 0 for all.
        far_of: Numbers of the scalars of the state whose distance that is: by default the place of TwoRoom's and PushT's
            agent, (2, 3) for PushT's block.
        samples: Number of samples a round of the planner.
        iterations: Number of rounds of a plan.
        elites: Number of elites.
        horizon: Steps of a plan.
        cost: Kind of cost, see `JEPACost`.
        seed: Seed of starts and planner.
    """
    jepa = load(checkpoint)
    if not isinstance(jepa, LatentDynamics):
        raise ValueError(f"{checkpoint} holds a {type(jepa).__name__}, not a world model.")
    known = data_of(checkpoint)
    if known is None:
        raise ValueError(f"The data of {checkpoint} is not known: no config.yaml lies next to it.")
    arguments = {name: value for name, value in known["init_args"].items() if name != "collect"}
    data = Trajectories(**(arguments | ({} if root is None else {"root": root})))
    search: dict[str, Any] = {"samples": samples, "iterations": iterations, "elites": elites, "horizon": horizon}
    task: dict[str, Any] = {"episodes": episodes, "offset": offset, "budget": budget}
    task |= {"far": far, "far_of": far_of, "seed": seed}
    policies = {"world_model": JEPACost(jepa, cost), "random": None}
    found = {
        name: evaluate(data, environment, model, history=jepa.history, **task, **search) for name, model in policies.items()
    }
    lines = ["| policy | success | standard error | seconds |", "| :-- | --: | --: | --: |"]
    for name, row in found.items():
        cells = [f"{row['success']:.2f}", f"{row['standard_error']:.2f}", f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join([name.replace("_", " "), *cells]) + " |")
    report = found | {"environment": environment, "task": task, "search": search | {"cost": cost}, "checkpoint": checkpoint}
    directory = Path(checkpoint) if Path(checkpoint).is_dir() else Path(checkpoint).parent
    notes = f"`World.evaluate` of stable-worldmodel on {environment}: {json.dumps(task)}; CEM: {json.dumps(search)}."
    title, table = "Planning in stable-worldmodel", "\n".join(lines)
    save_report(directory / "harness", report, title, notes, table, "jepa_lightning.harness")
    return report


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
