"""Mutants run against tests: a process is forked for each, in which the changed module takes the place of the real one."""

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
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is there: a forked process inherits no threads

import pytest
from mutants import Mutant

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "runs" / "mutation"
LOG = KEPT / "log.txt"
"""What the last forked process printed."""

PRELOADED = (
    "av matplotlib.pyplot torch torchvision.transforms.v2 lightning.pytorch lightning.pytorch.cli "
    "tensorboard.backend.event_processing.event_accumulator timm torchmetrics.classification hypothesis"
).split()
"""Libraries that take long to load, and none of our own packages."""

MIN_TIMEOUT, TIMEOUT_FACTOR = 60, 10
"""Seconds that a mutant may take, and how many times as long as its tests take without a change, if that is more."""

BROKEN = 99
"""Exit code of a forked process in which something other than a test failed."""

OPTIONS = ["-q", "-p", "no:cacheprovider", "--no-header", "-o", "timeout=0", "-W", "ignore:Module already imported"]


def preload() -> None:
    """Load libraries, and see that tests find this working tree first."""
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    KEPT.mkdir(parents=True, exist_ok=True)
    for library in PRELOADED:
        importlib.import_module(library)
    gc.freeze()  # pages that a forked process need not copy
    atexit.register(gc.unfreeze)


class Recorder:
    """A pytest plugin: which functions of a file each test enters, and how long it takes.

    Args:
        file: File of the module.
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


def digest(files: list[str]) -> str:
    """Of the contents of files."""
    return hashlib.sha256(b"\0".join((ROOT / file).read_bytes() for file in files)).hexdigest()[:16]


class Verdicts:
    """The tests of one module.

    Args:
        module: Path of the file.
        files: Files of tests.

    Raises:
        RuntimeError: A test fails without any change.
    """

    def __init__(self, module: str, files: list[str]) -> None:
        self.module, self.files = module, [*files, "tests/conftest.py"]
        self.fingerprint = digest(self.files)
        self.tests = self._record(files)
        self._sound: dict[str, bool] = {}

    def _record(self, files: list[str]) -> dict[str, dict[str, Any]]:
        """Node id of each test that passes -> its "seconds", and "functions", those of the module that it enters."""
        kept = KEPT / f"{self.module.replace('/', '.')}.tests.json"
        fingerprint = digest([self.module, *self.files])
        if kept.exists() and (found := json.loads(kept.read_text()))["fingerprint"] == fingerprint:
            return found["tests"]

        def work() -> int:
            recorder = Recorder(ROOT / self.module)
            code = pytest.main([*OPTIONS, *files], plugins=[recorder])
            passed = {name: test for name, test in recorder.tests.items() if test["passed"]}
            kept.write_text(json.dumps({"fingerprint": fingerprint, "tests": passed}))
            return int(code)

        if in_a_fork(work, 1800, LOG) != 0:
            raise RuntimeError(f"The tests of {self.module} do not pass without a change:\n{LOG.read_text()[-3000:]}")
        return json.loads(kept.read_text())["tests"]

    def _chosen(self, function: str) -> tuple[list[str], float]:
        """The tests that enter a function, file by file, the fastest first; and their seconds."""
        files: dict[str, list[tuple[float, str]]] = defaultdict(list)
        for name, test in self.tests.items():
            if not function or function in test["functions"]:
                files[name.partition("::")[0]].append((test["seconds"], name))
        parts = sorted((sum(seconds for seconds, _ in part), sorted(part)) for part in files.values())
        return [name for _, part in parts for _, name in part], sum(seconds for seconds, _ in parts)

    def _run(self, names: list[str], seconds: float, mutant: Mutant | None) -> int | None:
        def work() -> int:
            if mutant is not None:
                sys.meta_path.insert(0, ChangedModule(mutant))
            return int(pytest.main(["-x", *OPTIONS, *names]))

        code = in_a_fork(work, max(MIN_TIMEOUT, TIMEOUT_FACTOR * seconds), LOG)
        if code == BROKEN and mutant is None:  # a mutant may break pytest itself, in what runs when it ends
            raise RuntimeError(f"pytest did not run:\n{LOG.read_text()[-3000:]}")
        return code

    def verdict(self, mutant: Mutant) -> str:
        """What becomes of a mutant: "killed", "timeout", "survived", or "unreached" if no test enters its function.

        Raises:
            RuntimeError: The same tests fail without the change, or were edited meanwhile: nothing would be proved.
        """
        names, seconds = self._chosen(mutant.function)
        if not names:
            return "unreached"
        code = self._run(names, seconds, mutant)
        if code == 0:
            return "survived"
        if mutant.function not in self._sound:
            self._sound[mutant.function] = self._run(names, seconds, None) == 0
        if not self._sound[mutant.function] or digest(self.files) != self.fingerprint:
            raise RuntimeError(
                f"The tests that enter {mutant.function} of {self.module} must pass alone without a change, and none may be "
                f"edited while they run:\n{LOG.read_text()[-3000:]}"
            )
        return "timeout" if code is None else "killed"
