"""Agree on one verdict of all ranks on their posts, through a store of ``torch.distributed``.

A collective would hang if a rank is missing or late, and must not run beside another one of the
same group. The verdict is written by an atomic compare-and-set, so it is the same for ranks that
gave up waiting and for those that did not.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

Judge = Callable[[Sequence[str | None]], str]

# Seconds that a store may take for an answer. It never answers if its process stands still.
ANSWER = 5.0
# Bytes that must be free where a store is a file: more than all ranks write in a round.
RESERVE = 1 << 20


class TimedStore:
    """A store of ``torch.distributed`` that answers each question within a time, or raises.

    torch's client waits in its socket without a deadline if the store's process stands still. So a
    thread asks, one question after another. If no answer comes, the thread is abandoned; it ends
    with an answer or with the process.

    A ``FileStore`` is asked nothing without its file, and while its disk is full. It would make a
    new file, or write half of a value, and whoever then reads that computes for ever: torch's
    client seeks what is missing, also when a process ends.

    Parameters
    ----------
    store
        The store.
    seconds
        Time for an answer. A store that runs takes less than a millisecond.
    """

    def __init__(self, store: Any, seconds: float = ANSWER) -> None:
        self._store, self._seconds = store, seconds
        # The file of a store that is one.
        self.file = find_file(store)
        self._questions: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._ask, name="moetuner-store", daemon=True).start()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: self._answer(name, arguments)

    def close(self) -> None:
        """End the thread once all questions have their answers."""
        self._questions.put(None)

    def put_later(self, key: str, value: str) -> None:
        """Write a value if there is none yet, as soon as the store answers again."""
        self._questions.put(lambda: self._call("compare_set", (key, "", value)))

    def _ask(self) -> None:
        while (question := self._questions.get()) is not None:
            # Nobody waits for a question that fails later.
            with suppress(Exception):
                question()

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> Any:
        answers: SimpleQueue[tuple[Any, Exception | None]] = SimpleQueue()

        def question() -> None:
            try:
                answers.put((self._call(name, arguments), None))
            except Exception as error:
                answers.put((None, error))

        self._questions.put(question)
        try:
            answer, error = answers.get(timeout=self._seconds)
        except Empty:
            raise TimeoutError(f"the store did not answer within {self._seconds:g} s") from None
        if error is not None:
            raise error
        return answer

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


def list_keys(key: str, size: int) -> list[str]:
    """Return the keys of a question in the store: a post of every rank, and the verdict."""
    return [*(f"{key}/{rank}" for rank in range(size)), verdict_key(key)]


def verdict_key(key: str) -> str:
    """Return the key of the verdict on a question."""
    return f"{key}/verdict"


def agree(
    store: Any,
    key: str,
    rank: int,
    size: int,
    *,
    post: str,
    judge: Judge,
    wait: float,
    distrusts: Callable[[str], bool] = lambda post: False,
) -> tuple[str, bool]:
    """Write this rank's post, and return the one verdict on the posts of all ranks.

    Rank 0 judges when all have posted, or after ``wait`` seconds. After twice that time another
    rank judges, and takes rank 0 for silent whatever it posts. It judges at once if it
    ``distrusts`` the post of rank 0, whose verdict it may not get. A rank that comes later reads
    the verdict without waiting. All ranks reach the store. ``key`` is the question, which is asked
    once; ``judge`` takes the posts by rank, None for a silent one.

    Returns the verdict, and whether this rank has seen all posts. If so, all ranks have read the
    verdicts on earlier questions.

    Raises
    ------
    TimeoutError, RuntimeError
        If the store does not answer, fails, or has lost what this rank wrote.
    """
    *posts, verdict = list_keys(key, size)
    store.set(posts[rank], post)
    _require(store, posts[rank])
    complete, trusted = False, posts
    if not rank:
        _until(lambda: store.check(posts) or store.check([verdict]), wait)
        complete = store.check(posts)
    else:
        deadline = time.monotonic() + 2 * wait
        _until(lambda: store.check([verdict]) or store.check(posts[:1]), 2 * wait)
        only_posted = not store.check([verdict]) and store.check(posts[:1])
        if not (only_posted and distrusts(store.get(posts[0]).decode())):
            _until(lambda: store.check([verdict]), deadline - time.monotonic())
            trusted = posts[1:]
    if store.check([verdict]):
        return store.get(verdict).decode(), complete
    messages = [
        store.get(name).decode() if name in trusted and store.check([name]) else None
        for name in posts
    ]
    # A verdict that is there already holds.
    message = store.compare_set(verdict, "", judge(messages)).decode()
    _require(store, verdict)
    return message, complete


def _require(store: Any, key: str) -> None:
    """Raise if the store has lost what was just written: then no rank reads it."""
    if not store.check([key]):
        file = getattr(store, "file", None)
        why = "" if file is None else f": its file {file} was replaced"
        raise RuntimeError(f"the store has lost what this rank wrote{why}")


def _until(is_so: Callable[[], bool], seconds: float) -> bool:
    """Wait until a condition holds, or the time is over; return whether it holds.

    Questions are short: a wait inside the store would block other threads of the process.
    """
    deadline, pause = time.monotonic() + seconds, 0.0002
    while not is_so():
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    return True
