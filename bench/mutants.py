"""Which changes of the code does no test notice? Random mutants, each against its subject's tests.

cosmic-ray (``pip install cosmic-ray``, beside the tools of ``make test``) knows the changes. Here
some are drawn with a seed, and each is tried in a process and a copy of the package of its own, so
that the working tree stays as it is. They begin in the order in which they were drawn: any number
of the first is a random sample, too. What survives, and why: docs/testing.md.

    python bench/mutants.py --count 120 > mutants.txt
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parents[1]
PACKAGE = Path("python/moetuner")

# Tests of a subject, by the beginning of a module's path; the first that fits counts.
SOLVER = "tests/solver/test_"
OBJECTIVES = [f"{SOLVER}search.py", f"{SOLVER}objectives.py"]
SUBJECTS = {
    "problem/windows": OBJECTIVES,
    "problem/objective": ["tests/evaluation/test_regime.py", "tests/problem", *OBJECTIVES],
    "problem": [
        "tests/problem",
        "tests/formats/test_engines.py",
        "tests/test_arguments.py",
        *OBJECTIVES,
    ],
    "evaluation": ["tests/evaluation"],
    "solver/unseen": [
        *(f"{SOLVER}{name}.py" for name in ("unseen", "noise", "moves", "dispatch", "balance")),
        *OBJECTIVES,
    ],
    "solver/bounds": [
        f"{SOLVER}bound.py",
        f"{SOLVER}chain.py",
        f"{SOLVER}proofs.py",
        f"{SOLVER}objectives.py",
    ],
    "solver/milp": [f"{SOLVER}ilp.py"],
    "solver/two_stage": [f"{SOLVER}two_stage.py"],
    "solver/stages/moves": [f"{SOLVER}moves.py", f"{SOLVER}pareto.py", *OBJECTIVES],
    "solver/pareto": [f"{SOLVER}pareto.py"],
    "solver/stages": [
        f"{SOLVER}solver.py",
        f"{SOLVER}dispatch.py",
        f"{SOLVER}chain.py",
        *OBJECTIVES,
    ],
    "solver": [f"{SOLVER}solver.py", f"{SOLVER}balance.py", *OBJECTIVES],
}
# Unions of types are no sums, and effort is a matter of time.
LEFT_OUT = ("ReplaceBinaryOperator_BitOr_", "RemoveDecorator")
NOT_MUTATED = ("solver/effort.py",)
# Seconds of the processor that tests of one mutant may take: what loops for ever is noticed.
SECONDS = 90

# Module, line and column, and the name of a change with its number among those of the module.
Drawn = tuple[Path, tuple[int, int], tuple[str, int]]


def places() -> list[tuple[Path, tuple[int, int], list[tuple[str, int]]]]:
    """Return every place of a change: module, line and column, and the changes that there are."""
    # What one operator becomes another of, is at the same places whichever it becomes.
    alike: dict[str, list[str]] = {}
    for name in operator_names():
        if not get_operator(name).arguments() and not any(word in name for word in LEFT_OUT):
            kind = name if "_Delete_" in name else "_".join(name.split("_")[:2])
            alike.setdefault(kind, []).append(name)
    mutations = []
    for folder in ("problem", "solver", "evaluation"):
        for path in sorted((ROOT / PACKAGE / folder).rglob("*.py")):
            module = path.relative_to(ROOT / PACKAGE)
            if module.as_posix() in NOT_MUTATED:
                continue
            nodes, here = list(ast_nodes(get_ast_from_path(path))), {}
            for names in alike.values():
                operator = get_operator(names[0])()
                spans = (start for node in nodes for start, _ in operator.mutation_positions(node))
                for occurrence, start in enumerate(spans):
                    here.setdefault(start, []).extend((name, occurrence) for name in names)
            mutations += [(module, start, changes) for start, changes in sorted(here.items())]
    return mutations


def tested(folder: Path, tests: list[str]) -> int:
    """Run tests on the package of a folder in this process, and return their exit status."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    os.chdir(folder)
    sys.path.insert(0, str(folder / "python"))
    sys.argv = ["pytest"]
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    import pytest

    quiet = ["-x", "-q", "-p", "no:cacheprovider", "--timeout=900"]
    return int(pytest.main([*quiet, "-k", "not interrupt and not progress", *tests]))


def attempt(drawn: Drawn, folder: Path) -> tuple[int, str]:
    """Make one change in a copy of the package; return what its tests end with, and the change.

    In a process of its own, which has not imported the package.
    """
    module, (line, _), (name, occurrence) = drawn
    tests = next(of for start, of in SUBJECTS.items() if module.as_posix().startswith(start))
    for part in ("python", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    path = folder / PACKAGE / module
    before = path.read_text()
    path.write_text(mutate_code(before, get_operator(name)(), occurrence))
    was, now = (text.splitlines()[line - 1].strip() for text in (before, path.read_text()))
    print(f"{module}:{line}\t{was}\t{now}", end="", file=(folder / "change").open("w"))
    return tested(folder, tests)


def outcome(status: int) -> str:
    """Return what a status of `os.wait` says of a mutant."""
    code = os.waitstatus_to_exitcode(status)
    if code in (0, 1, 2):
        return ("survived", "killed", "killed")[code]
    return "killed (endless)" if -code in (signal.SIGKILL, signal.SIGXCPU) else f"unknown ({code})"


def main() -> None:
    """Draw mutants and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=120, help="mutants to draw")
    parser.add_argument("--first", type=int, default=0, help="mutants of the sample to pass over")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    options = parser.parse_args()
    random.seed(options.seed)
    every = places()
    sample = [
        (module, start, random.choice(changes))
        for module, start, changes in random.sample(every, min(options.count, len(every)))
    ]
    print(f"{len(every)} places of {sum(len(of) for *_, of in every)} changes", file=sys.stderr)
    running: dict[int, tuple[int, Path]] = {}

    def reap() -> None:
        pid, status = os.wait()
        number, folder = running.pop(pid)
        print(number, outcome(status), (folder / "change").read_text(), sep="\t", flush=True)
        shutil.rmtree(folder)

    for number, drawn in list(enumerate(sample))[options.first :]:
        if len(running) == options.jobs:
            reap()
        folder = Path(tempfile.mkdtemp())
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = attempt(drawn, folder)
            except Exception as error:
                (folder / "change").write_text(f"{drawn}: {error}")
            finally:
                os._exit(code)
        running[pid] = number, folder
    while running:
        reap()


if __name__ == "__main__":
    main()
