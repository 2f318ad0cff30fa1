"""Seconds per step of the demo, on a quiet machine and next to one busy process, here and at another commit, in turns.

    git worktree add ../before 365b48d
    python benchmarks/demo_step.py --before ../before

Both run the command line of configs/pendulum/demo.yaml as a person would, so what it sets up for a CPU counts. The busy
process multiplies numbers in a loop. Quoted is the median over the steps of a run, and over the rounds, without the first
steps.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from lightning.pytorch import Callback

ROOT = Path(__file__).parent.parent
WARM_UP = 10
BUSY = [sys.executable, "-c", "while True: sum(range(1000))"]


class StepTimes(Callback):
    """Print the median time of a training step at the end."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.times.append(time.perf_counter())

    def on_train_end(self, *_: object) -> None:
        steps = [later - earlier for earlier, later in zip(self.times[WARM_UP:], self.times[WARM_UP + 1 :], strict=False)]
        print(f"median {statistics.median(steps)}", flush=True)


def step_seconds(tree: Path, steps: int, extra: list[str]) -> float:
    """Of the demo in a checkout."""
    (config,) = (path for path in (tree / "configs").rglob("demo.yaml"))  # older checkouts have it in another folder
    command = [sys.executable, "-m", "jepa_lightning", "fit", "--config", str(config), *extra]
    command += ["--trainer.max_epochs=-1", f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=0"]
    command += ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
    command += ["--trainer.default_root_dir=runs/demo_step", "--trainer.callbacks+=demo_step.StepTimes"]
    environment = os.environ | {"PYTHONPATH": f"{tree}:{ROOT / 'benchmarks'}"}
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True, check=True)
    return float(done.stdout.rsplit("median ", 1)[1].split()[0])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of an earlier commit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    trees = {"here": ROOT} | ({"before": options.before.resolve()} if options.before else {})
    found: dict[tuple[str, str], list[float]] = {}
    for round_ in range(options.rounds):
        for machine in ("quiet", "busy"):
            other = subprocess.Popen(BUSY) if machine == "busy" else None
            for name, tree in trees.items():
                seconds = step_seconds(tree, options.steps, [])
                found.setdefault((machine, name), []).append(seconds)
                print(f"round {round_ + 1}, {machine}, {name}: {seconds:.4f} s a step", flush=True)
            if other is not None:
                other.kill()
                other.wait()
    print("\n| machine | here | before | before / here |\n| :-- | --: | --: | --: |")
    for machine in ("quiet", "busy"):
        here, before = found[machine, "here"], found.get((machine, "before"), [])
        cells = [f"{statistics.median(here):.4f} s", f"{statistics.median(before):.4f} s" if before else "-"]
        ratios = [b / h for b, h in zip(before, here, strict=False)]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-")
        print(f"| {machine} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
