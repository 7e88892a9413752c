"""Run a function on several processes joined by gloo, and return what each of them answers.

The functions are in modules that import no test tools, and a fork server has imported those
already, so that a process costs milliseconds.
"""

import importlib
import multiprocessing as mp
import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

# What the processes import by name: the work of the ranks, and the oracles.
IMPORTED = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "oracles")]
# Seconds after which ranks hang: less than a test may take, so that they are named and ended.
LONGEST = 1500.0
IMPORTED += filter(None, [os.environ.get("PYTHONPATH")])


def answers(ranks: int, work: str, *arguments: Any) -> list[Any]:
    """Call ``module.function(rank, *arguments)``; return by rank its result and its error.

    Once one has raised, the others, which may wait for it, are ended.
    """
    results = []
    # A pool for every rank: with one for all, the loss of one rank would be that of all.
    pools = [ProcessPoolExecutor(1, _context()) for _ in range(ranks)]
    with TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        given = (ranks, work, arguments)
        jobs = [pool.submit(_work, store, rank, *given) for rank, pool in enumerate(pools)]
        _wait(jobs)
        for pool, job in zip(pools, jobs, strict=True):
            try:
                results.append((job.result(0), None))
            except Exception as error:
                killed = isinstance(error, BrokenProcessPool)
                why = "killed" if killed else f"{type(error).__name__}: {error}"
                results.append((None, why))
            if not job.done():
                next(iter(pool._processes.values())).kill()
            pool.shutdown()
    return results


def _wait(jobs: list[Future[Any]]) -> None:
    """Wait until all have ended, or one has raised, or the time is over."""
    deadline, running = time.monotonic() + LONGEST, set(jobs)
    while running:
        left = max(deadline - time.monotonic(), 0)
        ended, running = wait(running, left, FIRST_COMPLETED)
        errors = [job.exception() for job in ended]
        if not ended or any(error and not isinstance(error, BrokenProcessPool) for error in errors):
            break


def values(ranks: int, work: str, *arguments: Any) -> list[Any]:
    """Return the result of every rank; fail with the errors of all that raised."""
    results = answers(ranks, work, *arguments)
    errors = {rank: error for rank, (_, error) in enumerate(results) if error is not None}
    assert not errors, errors
    return [value for value, _ in results]


def _context() -> Any:
    """Start the fork server, if it does not run; its path is of the environment, not ours."""
    context = mp.get_context("forkserver")
    modules = ("layer", "state", "rebalance", "transformers")
    context.set_forkserver_preload([f"rank_{module}" for module in modules])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(IMPORTED)):
        forkserver.ensure_running()
    return context


def _work(store: str, rank: int, ranks: int, work: str, arguments: tuple[Any, ...]) -> Any:
    module, function = work.split(".")
    call = getattr(importlib.import_module(module), function)
    return importlib.import_module("rank_layer").join(store, rank, ranks, call, arguments)
