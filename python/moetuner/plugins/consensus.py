"""One verdict of all ranks on what each of them posts, through a store of ``torch.distributed``.

The store carries it, not a collective: a collective hangs where a rank is missing or late, and may
not run beside another one of the same group. The verdict is written by an atomic compare-and-set,
so it is the same for ranks that gave up waiting and for those that did not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

Judge = Callable[[Sequence[str | None]], str]


def list_keys(key: str, size: int) -> list[str]:
    """Return what a question leaves in the store: a post of every rank, and the verdict."""
    return [*(f"{key}/{rank}" for rank in range(size)), verdict_key(key)]


def verdict_key(key: str) -> str:
    """Return where the verdict on a question stands, once there is one."""
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
    """Post what this rank says, and return the one verdict on what all ranks say.

    Rank 0 judges when all have posted, or after ``wait`` seconds what there is. After twice that
    another rank judges, for which rank 0 is silent whatever it posts; and at once where it
    ``distrusts`` the post of rank 0, whose judgement it may not get. A rank that comes later reads
    the verdict without waiting. All ranks reach the store; ``key`` is the question, asked once;
    ``judge`` takes the posts by rank, None of a silent one.

    Returns the verdict, and whether this rank has seen the posts of all: they have then read the
    verdicts on all earlier questions.
    """
    *posts, verdict = list_keys(key, size)
    store.set(posts[rank], post)
    complete, heeded = False, posts
    if not rank:
        _until(lambda: store.check(posts) or store.check([verdict]), wait)
        complete = store.check(posts)
    else:
        deadline = time.monotonic() + 2 * wait
        _until(lambda: store.check([verdict]) or store.check(posts[:1]), 2 * wait)
        heard = not store.check([verdict]) and store.check(posts[:1])
        if not (heard and distrusts(store.get(posts[0]).decode())):
            _until(lambda: store.check([verdict]), deadline - time.monotonic())
            heeded = posts[1:]
    if store.check([verdict]):
        return store.get(verdict).decode(), complete
    said = [
        store.get(name).decode() if name in heeded and store.check([name]) else None
        for name in posts
    ]
    # What there is already holds.
    return store.compare_set(verdict, "", judge(said)).decode(), complete


def _until(is_so: Callable[[], bool], seconds: float) -> bool:
    """Poll until something is so, or the time is over.

    Short questions, as a wait inside the store would keep other threads of the process from it.
    """
    deadline, pause = time.monotonic() + seconds, 0.0002
    while not is_so():
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    return True
