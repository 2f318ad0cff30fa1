"""Variants of a world model at the same CPU time, planned with in stable-worldmodel's harness, over several seeds.

    python benchmarks/variants.py [--steps 700] [--seeds 0 1 2] [--variants base "prefix predictor"] [--out FILE]

TwoRoom as configs/worlds/tworoom.yaml has it (needs the extra swm; the recording is made if it is not there), with far less
training, so that there is something to gain. Each variant changes one thing. The time of a step is first taken of all of
them in turns, and what costs more than the base gets fewer steps in proportion. Prints a line as soon as a run has
ended, then a table with means and standard errors over seeds: success at offset 75 and budget 100, and at offset 25 and
budget 50 where start and goal are more than 16 pixels apart.
"""

import argparse
import gc
import json
import logging
import math
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer

from datamodules import Trajectories
from datamodules.collecting import Collect
from datamodules.environments import EnvironmentSettings
from jepa_lightning import DynamicsJEPA
from jepa_lightning.harness import JEPACost, evaluate

CONFIG = Path(__file__).parents[1] / "configs" / "worlds" / "tworoom.yaml"
TASKS = {"offset 75": {"offset": 75, "budget": 100}, "offset 25, far": {"offset": 25, "budget": 50, "far": 16.0}}
SEARCH = {"samples": 100, "iterations": 10, "elites": 10}
TIMED_STEPS = (5, 35)
"""Steps of two short fits, whose difference is the time of a step: what starts a fit is in both."""

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "base": {},
    "inverse dynamics": {"model": {"inverse_dynamics": 1.0}},
    "curvature 0.1": {"model": {"regularizer_weights": {"curvature": 0.1}}},
    "SIGReg": {"model": {"regularizer": "sigreg"}},
    "SIGReg in subspaces": {"model": {"regularizer": "subspace_sigreg"}},
    "history 2": {"data": {"history": 2}},
    "history 3": {"data": {"history": 3}},
    "horizon 1": {"model": {"horizon": 1}},
    "horizon 2": {"model": {"horizon": 2}},
    "horizon 6": {"model": {"horizon": 6}, "data": {"windows": 9}},
    "prefix predictor": {"model": {"predictor": "prefix", "predictor_width": 128}},
    "cost summed": {"plan": {"cost": "summed"}},
}
"""Variant -> changes of the model, the data and the search."""


def fit(data: Trajectories, arguments: dict[str, Any], steps: int, seed: int) -> tuple[DynamicsJEPA, float]:
    """A model after so many steps, and the CPU seconds that they took."""
    torch.manual_seed(seed)
    model = DynamicsJEPA.for_data(data, **arguments)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, limit_val_batches=0, gradient_clip_val=5.0, **quiet
    )
    began = time.process_time()
    trainer.fit(model, data)
    return model, time.process_time() - began


def prepared(config: dict[str, Any], changes: dict[str, dict[str, Any]], seed: int) -> Trajectories:
    """The recording as a variant sees it: one object for all that see the same, since it is more than a gigabyte."""
    key = f"{seed} {changes.get('data')}"
    if key not in recordings:
        recordings[key] = recording(config["data"]["init_args"] | changes.get("data", {}), seed)
    return recordings[key]


recordings: dict[str, Trajectories] = {}
"""Those of this process."""


def recording(arguments: dict[str, Any], seed: int) -> Trajectories:
    """The recording, made if it is not there."""
    arguments = dict(arguments)
    collect = dict(arguments.pop("collect"))
    environment = EnvironmentSettings(**collect.pop("environment"))
    data = Trajectories(collect=Collect(environment, **collect), seed=seed, **arguments)
    data.prepare_data()
    return data


def model_arguments(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Arguments of a variant's model; the warm-up is as long as in the full run, since a shorter one can kill ReLUs."""
    return config["model"]["init_args"] | {"warmup_fraction": 0.12} | VARIANTS[name].get("model", {})


def step_seconds(config: dict[str, Any], names: list[str]) -> dict[str, float]:
    """CPU seconds of a step of each variant, the lowest of four rounds in turns; of the search alone, those of the base."""
    found: dict[str, float] = {}
    for _ in range(4):
        for name in names:
            if VARIANTS[name].keys() == {"plan"}:
                continue
            data, arguments = prepared(config, VARIANTS[name], 0), model_arguments(config, name)
            short, long = (fit(data, arguments, steps, 0)[1] for steps in TIMED_STEPS)
            step = (long - short) / (TIMED_STEPS[1] - TIMED_STEPS[0])
            found[name] = min(step, found.get(name, step))
    return {name: found.get(name, found["base"]) for name in names}


def measured(config: dict[str, Any], name: str, steps: int, seed: int, episodes: int) -> dict[str, float]:
    """Figures of one run of a variant."""
    changes = VARIANTS[name]
    data = prepared(config, changes, seed)
    trained = f"{seed} {changes.get('model')} {changes.get('data')}"
    if trained not in models:  # what differs in its search alone is trained once
        models[trained] = fit(data, model_arguments(config, name), steps, seed)
    model, took = models[trained]
    cost = JEPACost(model, changes.get("plan", {}).get("cost", "last"))
    found = {"steps": float(steps), "CPU seconds": took}
    environment = config["data"]["init_args"]["collect"]["environment"]["id"].rpartition(":")[2]
    for task, asked in TASKS.items():
        row = evaluate(data, environment, cost, episodes=episodes, history=data.history, seed=seed, **asked, **SEARCH)
        found[task] = row["success"]
    return found


models: dict[str, tuple[DynamicsJEPA, float]] = {}
"""Those of this process: model, CPU seconds."""


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Means and standard errors over seeds, in Markdown."""
    lines = ["| variant | steps | CPU seconds | " + " | ".join(TASKS) + " |", "| :-- |" + " --: |" * (2 + len(TASKS))]
    for name, runs in rows.items():
        cells = [f"{sum(run[column] for run in runs) / len(runs):.0f}" for column in ("steps", "CPU seconds")]
        for task in TASKS:
            values = torch.tensor([run[task] for run in runs])
            error = f" ({values.std().item() / math.sqrt(len(runs)):.3f})" if len(runs) > 1 else ""
            cells.append(f"{values.mean().item():.3f}{error}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=700, help="Steps of the base.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", help="File for the figures.")
    given = parser.parse_args()
    for quiet_name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(quiet_name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    rows: dict[str, list[dict[str, float]]] = {}
    config = yaml.safe_load(CONFIG.read_text())
    fit(prepared(config, {}, 0), config["model"]["init_args"], TIMED_STEPS[0], 0)  # what a process does once
    seconds = step_seconds(config, list(dict.fromkeys(["base", *given.variants])))
    print("milliseconds a step: " + ", ".join(f"{name} {1000 * value:.0f}" for name, value in seconds.items()), flush=True)
    for seed in given.seeds:
        recordings.clear()
        models.clear()
        gc.collect()  # trainers and models refer to each other
        for name in given.variants:
            steps = max(1, round(given.steps * seconds["base"] / seconds[name]))
            found = measured(config, name, steps, seed, given.episodes)
            rows.setdefault(name, []).append(found)
            print(f"seed {seed}, {name}: " + ", ".join(f"{key} {value:.3g}" for key, value in found.items()), flush=True)
            if given.out:
                Path(given.out).write_text(json.dumps(rows, indent=2))
    print(table(rows))
