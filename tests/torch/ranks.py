"""Run a function on several processes joined by gloo, and give what each of them answered.

The functions are in modules that import no test tools, and a fork server has imported those
already, so that a process costs milliseconds.
"""

import contextlib
import importlib
import multiprocessing as mp
import os
import time
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

# What the processes import by name: the work of the ranks, and the oracles.
IMPORTED = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "oracles")]
IMPORTED += filter(None, [os.environ.get("PYTHONPATH")])


@dataclass(frozen=True)
class Answer:
    """What a rank returned, or the error that it raised, or its exit status without either."""

    value: Any = None
    error: str | None = None
    exit: int | None = None


def answers(ranks: int, work: str, *arguments: Any, timeout: float = 60) -> list[Answer]:
    """Call ``module.function(rank, *arguments)`` on every rank; gives their answers by rank."""
    context = _context()
    with TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            mine, theirs = context.Pipe(duplex=False)
            job = (theirs, str(Path(folder) / "store"), rank, ranks, work, arguments)
            process = context.Process(target=_process, args=job, daemon=True)
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
        try:
            results = _collect(pipes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()
        return [
            Answer(exit=process.exitcode) if answer is None else answer
            for answer, process in zip(results, processes, strict=True)
        ]


def values(ranks: int, work: str, *arguments: Any, timeout: float = 60) -> list[Any]:
    """Give what every rank returned; fails on the first error."""
    results = answers(ranks, work, *arguments, timeout=timeout)
    for rank, answer in enumerate(results):
        assert answer == Answer(value=answer.value), f"rank {rank}: {answer}"
    return [answer.value for answer in results]


@cache
def _context() -> Any:
    """Start the fork server; it takes its path from the environment, not from this process."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(
        ["rank_layer", "rank_state", "rank_rebalance", "rank_transformers"]
    )
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(IMPORTED)):
        forkserver.ensure_running()
    return context


def _collect(pipes: list[Connection], deadline: float) -> list[Answer | None]:
    """Read one answer from every pipe; None from those that closed without."""
    results: list[Answer | None] = [None] * len(pipes)
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    while open_pipes and time.monotonic() < deadline:
        for pipe in wait(list(open_pipes), timeout=max(deadline - time.monotonic(), 0)):
            rank = open_pipes.pop(pipe)
            with contextlib.suppress(EOFError):
                results[rank] = pipe.recv()
            pipe.close()
    for rank in open_pipes.values():
        results[rank] = Answer(error="no answer within the time")
    return results


def _process(
    pipe: Connection, store: str, rank: int, ranks: int, work: str, arguments: tuple[Any, ...]
) -> None:
    module, function = work.split(".")
    try:
        call = getattr(importlib.import_module(module), function)
        joined = importlib.import_module("rank_layer").joined
        answer = Answer(value=joined(store, rank, ranks, call, arguments))
    except Exception as error:
        answer = Answer(error=f"{type(error).__name__}: {error}")
    pipe.send(answer)
    pipe.close()
