"""Cut runs short in every way they are cut in practice, resume them, and compare them with runs that were left alone.

    python benchmarks/faults.py                 # `make campaign`: 12 cuts of each kind and model, 5 full disks: 212 in all
    python benchmarks/faults.py --cuts 1 --full 1 --families pendulum

A model is trained for a few epochs by the command line. At a random moment it gets SIGKILL, SIGTERM, SIGUSR1 (under an
emulated SLURM, whose `scontrol requeue` starts the same command again) or Ctrl-C (to all of its processes), or its disk
becomes full. It is resumed, perhaps with another number of workers, and may be cut again. Workers, accumulation, validation
in mid-epoch and limit_train_batches are drawn at random. A run is lost unless its last checkpoint is at the step of the
uncut run's, with weights, optimizer and schedules that are equal bit for bit.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from fault_families import FAMILIES

ROOT = Path(__file__).parent.parent
KINDS = ("SIGKILL", "SIGTERM", "SIGUSR1", "SIGINT")
EXIT_CODES = {"SIGKILL": (-9,), "SIGTERM": (143, -15), "SIGUSR1": (138, -10), "SIGINT": (130,), "full disk": (0, 1)}
"""Of runs that were cut; a negative one is a signal that came before training had begun."""


class Scenario(NamedTuple):
    """What a run's weights depend on."""

    family: str
    accumulate: int
    limit: str  # of trainer.limit_train_batches: "1.0" is all


def command(scenario: Scenario, root: Path, data: Path, rng: random.Random) -> list[str]:
    """Arguments of a run; what its weights must not depend on is drawn at random."""
    arguments = [
        *("fit", *FAMILIES[scenario.family], "--trainer.default_root_dir", str(root), "--trainer.accelerator", "cpu"),
        *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
        *("--trainer.accumulate_grad_batches", str(scenario.accumulate), "--trainer.limit_train_batches", scenario.limit),
        *("--trainer.val_check_interval", rng.choice(["1.0", "0.3"]), "--data.num_workers", rng.choice(["0", "2"])),
        *("--trainer.callbacks+=LastCheckpoint", "--trainer.callbacks.every_n_train_steps", str(rng.randint(3, 9))),
    ]
    return arguments if scenario.family == "pendulum" else [*arguments, "--data.root", str(data)]


def child(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """The command line in a process of its own, which has imported everything already."""
    os.setsid()  # Ctrl-C goes to a terminal's whole process group
    os.environ.update(environment)
    os.chdir(ROOT)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    import torch

    from jepa_lightning.cli import main

    multiprocessing.set_start_method("fork", force=True)  # the platform's own, for workers
    torch.set_num_threads(1)
    sys.argv = ["jepa-lightning", *arguments]
    code: Any = 1
    try:
        main(arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code
        raise
    finally:
        Path(f"{log}.code").write_text(str(code))


def start(arguments: list[str], root: Path, environment: dict[str, str] | None = None) -> Any:
    """Start a run; its output goes into root.log."""
    Path(f"{root}.log.code").unlink(missing_ok=True)
    process = CONTEXT.Process(target=child, args=(arguments, environment or {}, f"{root}.log"))
    process.start()
    return process


def exit_code(process: Any, root: Path) -> int:
    """Of a process that has ended: what it noted itself, or, if it was killed, what is known of it."""
    noted = Path(f"{root}.log.code")
    return int(noted.read_text()) if noted.exists() else process.exitcode


def finish(arguments: list[str], root: Path, environment: dict[str, str] | None = None) -> float:
    """Run to the end, and say how long it took from the moment at which its configuration was written.

    Raises:
        RuntimeError: It ended with another code than 0.
    """
    process = start(arguments, root, environment)
    began = wait_until_begun(process, root)
    process.join()
    if code := exit_code(process, root):
        raise RuntimeError(f"exit code {code}:\n{Path(f'{root}.log').read_text()[-2000:]}")
    return time.monotonic() - began


def wait_until_begun(process: Any, root: Path) -> float:
    """Wait for config.yaml, which is written shortly before training begins."""
    config, before = root / "config.yaml", time.time_ns()
    while process.exitcode is None and not (config.exists() and config.stat().st_mtime_ns > before - 10**9):
        time.sleep(0.005)
    return time.monotonic()


def outcome(root: Path) -> dict[str, Any]:
    """What two runs must have in common."""
    from jepa_lightning.weights.checkpoints import read_checkpoint

    checkpoint = read_checkpoint(root / "checkpoints" / "last.ckpt")
    return {name: checkpoint[name] for name in ("global_step", "state_dict", "optimizer_states", "lr_schedulers")}


def same(first: Any, second: Any) -> bool:
    """Whether two nested structures of tensors and numbers are equal bit for bit."""
    import torch

    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def slurm(folder: Path) -> dict[str, str]:
    """The environment of a SLURM job of one process, with an scontrol that notes what it is asked."""
    folder.mkdir(parents=True, exist_ok=True)
    scontrol = folder / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {folder}/requeued\n')
    scontrol.chmod(0o755)
    names = {"JOB_ID": "7", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    path = {"PATH": f"{folder}:{os.environ['PATH']}"}
    return {f"SLURM_{name}": value for name, value in (names | {"NTASKS_PER_NODE": "1", "NODELIST": "n1"}).items()} | path


def cut(process: Any, root: Path, kind: str, seconds: float) -> int | None:
    """Wait for a while, cut the run, and return its exit code; None if it had ended before."""
    wait_until_begun(process, root)
    process.join(seconds)
    if process.exitcode is not None:
        return None
    with contextlib.suppress(ProcessLookupError):  # it may end by itself just now
        if kind == "full disk":  # no file can grow over this size, which a checkpoint is larger than
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2000, 2000))
        elif kind == "SIGINT":
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(process.pid, getattr(signal, kind))
    process.join()
    return None if "`Trainer.fit` stopped" in Path(f"{root}.log").read_text() else exit_code(process, root)


class Result(NamedTuple):
    """Of one run that was cut and resumed."""

    family: str
    kind: str
    cuts: int
    problem: str
    """Empty if nothing was lost."""


def campaign_run(scenario: Scenario, kind: str, whole: dict[str, Any], folder: Path, rng: random.Random) -> Result:
    """Cut a run, resume it, and compare it; again, until a cut has come before its end."""
    data = folder.parent / f"data_{scenario.family}"
    for attempt in range(20):
        root = folder / str(attempt)
        root.mkdir(parents=True)
        environment = slurm(root / "slurm") if kind == "SIGUSR1" else {}
        cuts = 0
        for round_ in range(rng.choice([1, 1, 2])):
            arguments = command(scenario, root, data, rng)
            if kind != "SIGUSR1":
                arguments += ["--ckpt_path", "auto"]
            if kind == "full disk":  # workers hand over batches in shared memory, to which the limit of files applies, too
                arguments += ["--data.num_workers", "0"]
            seconds = rng.uniform(0, 1 if round_ == 0 else 0.5) * whole["seconds"]
            code = cut(start(arguments, root, environment), root, kind, seconds)
            if code is None:
                break
            cuts += 1
            if code not in EXIT_CODES[kind]:
                return Result(scenario.family, kind, cuts, f"exit code {code}, see {root}.log")
        if not cuts:
            continue
        try:
            arguments = command(scenario, root, data, rng)
            # Under SLURM the same command goes on by itself; otherwise it is given --ckpt_path.
            finish(
                arguments if kind == "SIGUSR1" and requeued(root) else [*arguments, "--ckpt_path", "auto"], root, environment
            )
            found = outcome(root)
        except Exception as error:
            return Result(scenario.family, kind, cuts, f"{error}, see {root}.log")
        if found["global_step"] != whole["outcome"]["global_step"]:
            return Result(scenario.family, kind, cuts, f"ended at step {found['global_step']}, see {root}.log")
        equal = same(found, whole["outcome"])
        return Result(scenario.family, kind, cuts, "" if equal else f"other weights, see {root}.log")
    return Result(scenario.family, kind, 0, "was never cut before its end")


def requeued(root: Path) -> bool:
    """Whether scontrol was asked to start the job again."""
    return (root / "slurm" / "requeued").exists()


def main() -> None:
    """The campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=12, help="of each signal and model")
    parser.add_argument("--full", type=int, default=5, help="full disks of each model")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=60, help="after which no further run is cut")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began, rng = time.monotonic(), random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.jobs) as pool:
        folder = Path(name)
        jobs = [
            (family, kind)
            for family in options.families
            for kind, count in [*((kind, options.cuts) for kind in KINDS), ("full disk", options.full)]
            for _ in range(count)
        ]
        rng.shuffle(jobs)
        draws = [random.Random(f"{options.seed} {number}") for number in range(len(jobs))]
        scenarios = [
            Scenario(family, draw.choice((1, 3)), draw.choice(("1.0", "17")))
            for (family, _), draw in zip(jobs, draws, strict=True)
        ]

        def uncut(scenario: Scenario) -> dict[str, Any]:
            root = folder / "_".join(map(str, scenario))
            data = folder / f"data_{scenario.family}"
            seconds = finish(command(scenario, root, data, random.Random(0)), root)
            return {"seconds": seconds, "outcome": outcome(root)}

        first = list({scenario.family: scenario for scenario in scenarios}.values())
        whole = dict(zip(first, pool.map(uncut, first), strict=True))  # which makes the data of each family, once
        rest = sorted(set(scenarios) - set(first))
        whole |= dict(zip(rest, pool.map(uncut, rest), strict=True))

        def one(number: int) -> Result | None:
            if time.monotonic() - began > 60 * options.minutes:
                return None
            scenario, kind = scenarios[number], jobs[number][1]
            result = campaign_run(scenario, kind, whole[scenario], folder / str(number), draws[number])
            print(
                f"{number + 1} of {len(jobs)}: {' '.join(map(str, scenario))}, {kind}: {result.problem or 'equal'}",
                flush=True,
            )
            return result

        results = [result for result in pool.map(one, range(len(jobs))) if result is not None]
        lost = [result for result in results if result.problem]
        if lost:
            print("\nLogs of what was lost:")
            for result in lost:
                path = Path(f"{result.problem.rsplit('see ', 1)[-1]}")
                print(f"\n== {result}\n{path.read_text()[-3000:] if path.is_file() else ''}")
    table(results, options.families)
    if len(results) < len(jobs):
        print(f"{len(jobs) - len(results)} runs were not made: the time was over.")
    print(f"{time.monotonic() - began:.0f} s")
    sys.exit(bool(lost) or len(results) < len(jobs))


def table(results: list[Result], families: list[str]) -> None:
    """Cuts tried and runs lost, by model and kind, as Markdown, and all of it as a line of JSON."""
    cuts: Counter[tuple[str, str]] = Counter()
    lost: Counter[tuple[str, str]] = Counter()
    for result in results:
        cuts[result.family, result.kind] += result.cuts
        lost[result.family, result.kind] += bool(result.problem)
    kinds = [*KINDS, "full disk"]
    print("\n| cuts (runs lost) | " + " | ".join(kinds) + " |\n| :-- |" + " --: |" * len(kinds))
    for family in families:
        cells = [f"{cuts[family, kind]} ({lost[family, kind]})" for kind in kinds]
        print(f"| {family} | " + " | ".join(cells) + " |")
    print(json.dumps({"runs": len(results), "cuts": sum(cuts.values()), "lost": sum(lost.values())}))


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["jepa_lightning.cli", "tensorboard.summary"])

if __name__ == "__main__":
    main()
