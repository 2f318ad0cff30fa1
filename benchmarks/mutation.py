"""Mutation testing: which small changes of the code does no test see?

A seeded random sample of mutants (`mutants.py`), spread over the modules of mutation.toml. For each, a process is forked
that has torch and Lightning loaded already, takes the changed module in the place of the real one, and runs the tests
that enter the changed function, the fastest first, until one fails. Tests that start processes of their own are left
out: they take seconds, and a process that they start would load the real module.

    make mutate                                              # the whole sample
    make mutate MODULES="callbacks/ema.py callbacks/schedules.py" SAMPLE=0      # all mutants of two modules

An interrupted run goes on where it was: results are kept in runs/mutation. A mutant that was killed stays killed as long
as its module is the same; one that survived is tried again once the tests have changed. Mutants that change nothing are
listed with the reason in tests/equivalent_mutants.toml.
"""

import argparse
import atexit
import contextlib
import gc
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import tomllib
import traceback
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is there: a forked process inherits no threads

import pytest
from mutants import Mutant, mutants

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "runs" / "mutation"
PRELOADED = (
    "av matplotlib.pyplot torch torchvision.transforms.v2 lightning.pytorch lightning.pytorch.cli "
    "tensorboard.backend.event_processing.event_accumulator timm torchmetrics.classification hypothesis"
).split()
"""Libraries that take long to load, and none of our own packages."""

LEAST_TIMEOUT, TIMEOUT_FACTOR = 60, 10
"""Seconds that a mutant may take, and how many times as long as its tests take without a change, if that is more."""

BROKEN = 99
"""Exit code of a forked process in which something other than a test failed."""

OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "-o", "timeout=0", "-W", "ignore:Module already imported"]


class Recorder:
    """A pytest plugin: which functions of a file each test enters, and how long it takes.

    Args:
        file: Of the module.
    """

    def __init__(self, file: Path) -> None:
        self.file = str(file)
        self.tests: dict[str, dict[str, Any]] = {}
        self.on_import: set[str] = set()
        self._entered: set[str] = set()

    def _trace(self, frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename == self.file:
            self._entered.add(frame.f_code.co_qualname.partition(".<locals>")[0])

    @contextlib.contextmanager
    def _traced(self) -> Any:
        self._entered = set()
        threading.setprofile(self._trace)
        sys.setprofile(self._trace)
        yield
        sys.setprofile(None)
        threading.setprofile(None)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_collection(self, session: Any) -> Any:
        with self._traced():
            yield
        self.on_import = self._entered  # by every test

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        began = time.monotonic()
        with self._traced():
            yield
        test = self.tests.setdefault(item.nodeid, {"passed": False})
        test |= {"seconds": time.monotonic() - began, "functions": sorted(self._entered | self.on_import)}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and report.passed:
            self.tests.setdefault(report.nodeid, {})["passed"] = True


class ChangedModule(importlib.abc.MetaPathFinder):
    """Import one module from a changed source, all others as they are.

    Args:
        mutant: The source and its file.
    """

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant
        self.name = mutant.module.removesuffix(".py").replace("/", ".")

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """The real file's place with the changed code."""
        if fullname != self.name:
            return None
        file = str(ROOT / self.mutant.module)
        return importlib.util.spec_from_file_location(
            fullname, file, loader=ChangedLoader(fullname, file, self.mutant.source)
        )


class ChangedLoader(importlib.machinery.SourceFileLoader):
    """Load a file as if it held another source."""

    def __init__(self, fullname: str, path: str, source: str) -> None:
        super().__init__(fullname, path)
        self.source = source

    def get_code(self, fullname: str) -> Any:
        """The changed code, never that in __pycache__."""
        return compile(self.source, self.path, "exec")


def no_process(*_: Any, **__: Any) -> None:
    """In the place of subprocess.Popen."""
    pytest.skip("mutation testing starts no processes")


def in_a_fork(work: Any, timeout: float, log: Path) -> int | None:
    """Run a function in a forked process whose result is its exit code; None if it took too long."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        code = BROKEN
        try:
            os.setsid()
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(output, stream)
            subprocess.Popen = no_process  # type: ignore[assignment, misc]
            code = int(work())
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            with contextlib.suppress(ProcessLookupError):  # what it left behind
                os.killpg(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def record(module: str, tests: list[str]) -> dict[str, dict[str, Any]]:
    """What each test of a module enters: node id -> "functions", "seconds" of those that pass.

    Raises:
        RuntimeError: A test fails without any change.
    """
    kept = KEPT / f"{module.replace('/', '.')}.tests.json"
    fingerprint = digest([module, *tests, "tests/conftest.py"])
    if kept.exists() and (found := json.loads(kept.read_text()))["fingerprint"] == fingerprint:
        return found["tests"]

    def work() -> int:
        recorder = Recorder(ROOT / module)
        code = pytest.main([*OPTIONS[1:], *tests], plugins=[recorder])
        found = {name: test for name, test in recorder.tests.items() if test["passed"]}
        kept.write_text(json.dumps({"fingerprint": fingerprint, "tests": found}))
        return int(code)

    log = KEPT / "log.txt"
    if in_a_fork(work, 1800, log) != 0:
        raise RuntimeError(f"The tests of {module} do not pass without a change:\n{log.read_text()[-3000:]}")
    return json.loads(kept.read_text())["tests"]


def digest(files: list[str]) -> str:
    """Of the contents of files."""
    return hashlib.sha256(b"\0".join((ROOT / file).read_bytes() for file in files)).hexdigest()[:16]


def chosen_tests(mutant: Mutant, tests: dict[str, dict[str, Any]]) -> tuple[list[str], float]:
    """The tests that enter a changed function, file by file, the fastest first; and their seconds."""
    files: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for name, test in tests.items():
        if not mutant.function or mutant.function in test["functions"]:
            files[name.partition("::")[0]].append((test["seconds"], name))
    parts = sorted((sum(seconds for seconds, _ in part), sorted(part)) for part in files.values())
    return [name for _, part in parts for _, name in part], sum(seconds for seconds, _ in parts)


def verdict(mutant: Mutant, tests: dict[str, dict[str, Any]]) -> str:
    """What becomes of a mutant: "killed", "timeout", "survived", or "unreached" if no test enters its function."""
    names, seconds = chosen_tests(mutant, tests)
    if not names:
        return "unreached"

    def work() -> int:
        sys.meta_path.insert(0, ChangedModule(mutant))
        return int(pytest.main([*OPTIONS, *names]))

    code = in_a_fork(work, max(LEAST_TIMEOUT, TIMEOUT_FACTOR * seconds), KEPT / "log.txt")
    if code == BROKEN:
        raise RuntimeError(f"pytest did not run:\n{(KEPT / 'log.txt').read_text()[-3000:]}")
    return "timeout" if code is None else "survived" if code == 0 else "killed"


def sample(found: dict[str, list[Mutant]], size: int, seed: int) -> dict[str, list[Mutant]]:
    """`size` mutants, or all if it is 0: half of them spread evenly over the modules, half by the modules' sizes.

    Which are drawn from a module depends on the seed and on how many, not on the other modules.
    """
    total = sum(map(len, found.values()))
    chosen = {}
    for module, all_of_them in found.items():
        share = size / 2 / len(found) + size / 2 * len(all_of_them) / total
        count = len(all_of_them) if not size else min(len(all_of_them), round(share + 0.5))
        drawn = random.Random(f"{seed} {module}").sample(range(len(all_of_them)), count)
        chosen[module] = [all_of_them[number] for number in sorted(drawn)]
    return chosen


def main() -> None:
    """Run and report."""
    settings = tomllib.loads((ROOT / "mutation.toml").read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="files of mutation.toml; all if left out")
    parser.add_argument("--sample", type=int, default=settings["sample"], help="how many mutants in all; 0 takes every one")
    parser.add_argument("--seed", type=int, default=settings["seed"], help="of the sample")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    arguments = parser.parse_args()
    if unknown := set(arguments.modules) - set(settings["modules"]):
        parser.error(f"mutation.toml names no tests for {', '.join(sorted(unknown))}.")
    modules = {
        name: tests for name, tests in settings["modules"].items() if name in (arguments.modules or settings["modules"])
    }

    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    KEPT.mkdir(parents=True, exist_ok=True)
    results_file = KEPT / "results.jsonl"
    if arguments.fresh:
        results_file.unlink(missing_ok=True)
    results = {}
    if results_file.exists():
        results = {line["key"]: line for line in map(json.loads, results_file.read_text().splitlines())}
    for library in PRELOADED:
        importlib.import_module(library)
    gc.freeze()  # pages that a forked process need not copy
    atexit.register(gc.unfreeze)

    chosen = sample(
        {name: list(mutants(name, (ROOT / name).read_text())) for name in modules}, arguments.sample, arguments.seed
    )
    total, number, began = sum(map(len, chosen.values())), 0, time.monotonic()
    verdicts: dict[str, list[tuple[Mutant, str]]] = defaultdict(list)
    for module, its_mutants in chosen.items():
        tests = record(module, modules[module])
        fingerprint = digest([*modules[module], "tests/conftest.py"])
        for mutant in its_mutants:
            number += 1
            key = hashlib.sha256(f"{module}\0{mutant.source}".encode()).hexdigest()[:16]
            known = results.get(key)
            if known is None or (known["verdict"] in ("survived", "unreached") and known["tests"] != fingerprint):
                known = {"key": key, "tests": fingerprint, "verdict": verdict(mutant, tests)}
                with results_file.open("a") as file:
                    file.write(json.dumps(known) + "\n")
                minutes = (time.monotonic() - began) / 60
                print(f"{number}/{total} {minutes:.1f} min {module}:{mutant.line} {known['verdict']}", flush=True)
            verdicts[module].append((mutant, known["verdict"]))
    report(verdicts)


def report(verdicts: dict[str, list[tuple[Mutant, str]]]) -> None:
    """Print the table of modules, and the mutants that no test sees."""
    accepted = {
        (entry["module"], entry["removed"], entry["added"]): entry["reason"]
        for entry in tomllib.loads((ROOT / "tests" / "equivalent_mutants.toml").read_text())["mutant"]
    }
    rows, survivors, slow = [], [], []
    for module, pairs in verdicts.items():
        counts: dict[str, int] = defaultdict(int)
        for mutant, result in pairs:
            alive = result in ("survived", "unreached")
            same = alive and (module, mutant.removed, mutant.added) in accepted
            counts["equivalent" if same else "survived" if alive else "killed"] += 1
            if alive and not same:
                survivors.append((mutant, result))
            if result == "timeout":
                slow.append(mutant)
        rows.append((module, len(pairs), counts["killed"], counts["equivalent"], counts["survived"]))
    rows.append(("all", *(sum(row[column] for row in rows) for column in range(1, 5))))
    for mutant, result in survivors:
        print(f"\n{mutant.module}:{mutant.line} {mutant.function} {result}\n- {mutant.removed}\n+ {mutant.added}")
    for mutant in slow:
        print(f"\n{mutant.module}:{mutant.line} {mutant.function} took too long, and counts as killed\n+ {mutant.added}")
    print("\n| module | mutants | killed | equivalent | survived | score |\n| :-- | --: | --: | --: | --: | --: |")
    for module, count, killed, equivalent, survived in rows:
        print(f"| {module} | {count} | {killed} | {equivalent} | {survived} | {killed / max(1, count - equivalent):.1%} |")


if __name__ == "__main__":
    main()
