"""Agree on one verdict of all ranks on their posts, through a store of ``torch.distributed``.

A collective would hang if a rank is missing or late, and must not run beside another one of the
same group. The verdict is written by an atomic compare-and-set, so it is the same for ranks that
gave up waiting and for those that did not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

Judge = Callable[[Sequence[str | None]], str]


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
    """Return the one verdict on the posts of all ranks, and whether this rank has seen all posts.

    If it has, all ranks have read the verdicts on earlier questions. ``key`` is the question, which
    is asked once; all ranks reach the store, and each writes its post first. Rank 0 judges when all
    have posted, or after ``wait`` seconds. After twice that time another rank judges, or at once if
    it ``distrusts`` the post of rank 0, whose verdict it may not get. A rank that comes later reads
    the verdict without waiting. ``judge`` takes the posts by rank, None for a silent one.

    Raises
    ------
    TimeoutError, RuntimeError
        If the store does not answer, fails, or has lost what this rank wrote.
    """
    *posts, verdict = list_keys(key, size)
    store.set(posts[rank], post)
    _require(store, posts[rank])
    judged: Sequence[str] = posts
    if rank == 0:
        _wait_until(lambda: store.check(posts) or store.check([verdict]), wait)
    else:
        judged = _wait_for_rank_0(store, posts, verdict, wait, distrusts)
    complete = rank == 0 and store.check(posts)
    if store.check([verdict]):
        return store.get(verdict).decode(), complete
    messages = [
        store.get(name).decode() if name in judged and store.check([name]) else None
        for name in posts
    ]
    # A verdict that is there already holds.
    message = store.compare_set(verdict, "", judge(messages)).decode()
    _require(store, verdict)
    return message, complete


def _wait_for_rank_0(
    store: Any,
    posts: Sequence[str],
    verdict: str,
    wait: float,
    distrusts: Callable[[str], bool],
) -> Sequence[str]:
    """Return the keys of posts that another rank judges if there is no verdict after a wait.

    Not that of rank 0, whatever it posts meanwhile: it may have read another verdict.
    """
    deadline = time.monotonic() + 2 * wait
    _wait_until(lambda: store.check([verdict]) or store.check(posts[:1]), 2 * wait)
    has_posted = store.check(posts[:1]) and not store.check([verdict])
    if has_posted and distrusts(store.get(posts[0]).decode()):
        return posts
    _wait_until(lambda: store.check([verdict]), deadline - time.monotonic())
    return posts[1:]


def _require(store: Any, key: str) -> None:
    """Raise if the store has lost what was just written: then no rank reads it."""
    if not store.check([key]):
        file = getattr(store, "file", None)
        why = "" if file is None else f": its file {file} was replaced"
        raise RuntimeError(f"the store has lost what this rank wrote{why}")


def _wait_until(holds: Callable[[], bool], seconds: float) -> None:
    """Wait until a condition holds, or the time is over.

    Questions are short: a wait inside the store would block other threads of the process.
    """
    deadline, pause = time.monotonic() + seconds, 0.0002
    while not holds() and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
