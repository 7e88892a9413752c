"""Run a function on several processes joined by gloo, and give what each of them answered.

The functions are in modules that import no test tools, and a fork server has imported those
already, so that a process costs milliseconds.
"""

import importlib
import multiprocessing as mp
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

# What the processes import by name: the work of the ranks, and the oracles.
IMPORTED = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "oracles")]
IMPORTED += filter(None, [os.environ.get("PYTHONPATH")])


@dataclass(frozen=True)
class Answer:
    """What a rank returned, or the error that it raised, or that it was killed."""

    value: Any = None
    error: str | None = None


def answers(ranks: int, work: str, *arguments: Any, timeout: float = 60) -> list[Answer]:
    """Call ``module.function(rank, *arguments)`` on every rank; gives their answers by rank."""
    deadline = time.monotonic() + timeout
    # A pool for every rank: with one for all, the loss of one rank would be that of all.
    pools = [ProcessPoolExecutor(1, _context()) for _ in range(ranks)]
    with TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        given = (ranks, work, arguments)
        jobs = [pool.submit(_work, store, rank, *given) for rank, pool in enumerate(pools)]
        results = [_answer(job, deadline) for job in jobs]
        for pool, job in zip(pools, jobs, strict=True):
            if not job.done():
                next(iter(pool._processes.values())).kill()
            pool.shutdown()
    return results


def values(ranks: int, work: str, *arguments: Any, timeout: float = 60) -> list[Any]:
    """Give what every rank returned; fails on the first error."""
    results = answers(ranks, work, *arguments, timeout=timeout)
    for rank, answer in enumerate(results):
        assert answer.error is None, f"rank {rank}: {answer.error}"
    return [answer.value for answer in results]


@cache
def _context() -> Any:
    """Start the fork server; it takes its path from the environment, not from this process."""
    context = mp.get_context("forkserver")
    modules = ("layer", "state", "rebalance", "transformers")
    context.set_forkserver_preload([f"rank_{module}" for module in modules])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(IMPORTED)):
        forkserver.ensure_running()
    return context


def _answer(job: Future, deadline: float) -> Answer:
    try:
        return Answer(job.result(max(deadline - time.monotonic(), 0)))
    except BrokenProcessPool:
        return Answer(error="killed")
    except Exception as error:
        return Answer(error=f"{type(error).__name__}: {error}")


def _work(store: str, rank: int, ranks: int, work: str, arguments: tuple[Any, ...]) -> Any:
    module, function = work.split(".")
    call = getattr(importlib.import_module(module), function)
    return importlib.import_module("rank_layer").joined(store, rank, ranks, call, arguments)
