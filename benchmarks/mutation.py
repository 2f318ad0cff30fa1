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
import hashlib
import json
import random
import time
import tomllib
from collections import defaultdict

from mutant_runs import KEPT, ROOT, Verdicts, preload
from mutants import Mutant, mutants


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

    preload()
    results_file = KEPT / "results.jsonl"
    if arguments.fresh:
        results_file.unlink(missing_ok=True)
    results = {}
    if results_file.exists():
        results = {line["key"]: line for line in map(json.loads, results_file.read_text().splitlines())}

    chosen = sample(
        {name: list(mutants(name, (ROOT / name).read_text())) for name in modules}, arguments.sample, arguments.seed
    )
    total, number, began = sum(map(len, chosen.values())), 0, time.monotonic()
    verdicts: dict[str, list[tuple[Mutant, str]]] = defaultdict(list)
    for module, its_mutants in chosen.items():
        runner = Verdicts(module, modules[module])
        for mutant in its_mutants:
            number += 1
            key = hashlib.sha256(f"{module}\0{mutant.source}".encode()).hexdigest()[:16]
            known = results.get(key)
            if known is None or (known["verdict"] in ("survived", "unreached") and known["tests"] != runner.fingerprint):
                known = {"key": key, "tests": runner.fingerprint, "verdict": runner.verdict(mutant)}
                with results_file.open("a") as file:
                    file.write(json.dumps(known) + "\n")
                minutes = (time.monotonic() - began) / 60
                print(f"{number}/{total} {minutes:.1f} min {module}:{mutant.line} {known['verdict']}", flush=True)
            verdicts[module].append((mutant, known["verdict"]))
    report(verdicts)


def report(verdicts: dict[str, list[tuple[Mutant, str]]]) -> None:
    """Print the table of modules, and the mutants that no test sees."""
    accepted = {
        (entry["module"], entry["function"], entry["removed"], entry["added"])
        for entry in tomllib.loads((ROOT / "tests" / "equivalent_mutants.toml").read_text())["mutant"]
    }
    rows, survivors, slow = [], [], []
    for module, pairs in verdicts.items():
        counts: dict[str, int] = defaultdict(int)
        for mutant, result in pairs:
            alive = result in ("survived", "unreached")
            same = alive and (module, mutant.function, mutant.removed, mutant.added) in accepted
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
