"""A store of ``torch.distributed`` that answers within a time, or raises."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswer
from pathlib import Path
from queue import SimpleQueue
from typing import Any

# Seconds that a store may take for an answer. It never answers if its process stands still.
ANSWER = 5.0
# Bytes that must be free where a store is a file: more than all ranks write in a round.
RESERVE = 1 << 20


class TimedStore:
    """A store whose methods return within a time, or raise ``TimeoutError``.

    torch's client waits in its socket without a deadline if the store's process stands still. So a
    thread asks, one question after another. If no answer comes, the thread is abandoned; it ends
    with an answer or with the process.

    A ``FileStore`` is asked nothing without its file, and while its disk is full. It would make a
    new file, or write half of a value, and whoever then reads that computes for ever: torch's
    client seeks what is missing, also when a process ends.

    A store that runs answers in less than a millisecond.
    """

    def __init__(self, store: Any, seconds: float = ANSWER) -> None:
        self._store, self._seconds = store, seconds
        # The file of a store that is one.
        self.file = find_file(store)
        self._questions: SimpleQueue[tuple[Future[Any], str, tuple[Any, ...]] | None] = (
            SimpleQueue()
        )
        threading.Thread(target=self._work, name="moetuner-store", daemon=True).start()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(self._wait_for, name)

    def close(self) -> None:
        """End the thread once all questions have their answers."""
        self._questions.put(None)

    def put_later(self, key: str, value: str) -> None:
        """Write a value if there is none yet, as soon as the store answers again."""
        self._ask("compare_set", key, "", value)

    def _ask(self, name: str, *arguments: Any) -> Future[Any]:
        answer: Future[Any] = Future()
        self._questions.put((answer, name, arguments))
        return answer

    def _wait_for(self, name: str, *arguments: Any) -> Any:
        try:
            return self._ask(name, *arguments).result(self._seconds)
        except NoAnswer:
            raise TimeoutError(f"the store did not answer within {self._seconds:g} s") from None

    def _work(self) -> None:
        while (question := self._questions.get()) is not None:
            answer, name, arguments = question
            try:
                answer.set_result(self._call(name, arguments))
            except Exception as error:
                answer.set_exception(error)

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if self.file is not None:
            if not self.file.exists():
                raise RuntimeError(f"the store's file {self.file} was removed")
            disk = os.statvfs(self.file.parent)
            if disk.f_bavail * disk.f_frsize < RESERVE:
                raise RuntimeError(f"the disk of the store's file {self.file} is full")
        return getattr(self._store, name)(*arguments)


def find_file(store: Any) -> Path | None:
    """Return the file of a ``FileStore``, also of one behind prefixes; None for other stores."""
    while (inner := getattr(store, "underlying_store", None)) is not None:
        store = inner
    path = getattr(store, "path", None)
    return Path(path) if isinstance(path, str) else None
