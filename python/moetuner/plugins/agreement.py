"""Ranks agree on a map, or all of them take the engine's own.

Ranks that serve different maps wait for each other's weights for ever. So before a map is returned
every rank posts what it decided from which files, and one verdict holds for all (``consensus``):
also where a rank has no plugin, or another thread of the engine is in a collective.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from moetuner.plugins.consensus import agree, keys_of

# Seconds that a rank waits for the others. A rank without the plugin never answers.
WAIT = 30.0
# Rounds in which somebody was silent, after which this process asks no more.
PATIENCE = 2
# Characters of an error that are passed on.
LONGEST = 400
# Ranks that a line names.
MOST_NAMED = 8


@dataclass(frozen=True)
class Group:
    """The ranks that exchange experts.

    Parameters
    ----------
    store
        A store of ``torch.distributed`` that all of them reach.
    ranks
        Their numbers in the whole job.
    rank
        The place of this rank among them.
    """

    store: Any
    ranks: tuple[int, ...]
    rank: int


@dataclass(frozen=True)
class Post:
    """What a rank says of a decision.

    Parameters
    ----------
    files
        Checksum of its files and rules.
    map
        Checksum of the map, empty where there is none.
    error
        Why there is none.
    unread
        Whether the error is of the files, and so is one of the next decision too.
    pending
        Checksum of files that were read again, empty where none were.
    reloads
        Whether files may be read again.
    """

    files: str = ""
    map: str = ""
    error: str = ""
    unread: bool = False
    pending: str = ""
    reloads: bool = False


@dataclass(frozen=True)
class Verdict:
    """What all ranks do: ``take`` the map, ``own`` (the engine's), ``reload``, or ``off``.

    ``off`` is the engine's own map, now and always; ``silent`` says that a rank did not answer, and
    ``speaker`` is the first that did; ``speaks`` whether that is this one.
    """

    do: str
    reason: str = ""
    silent: bool = False
    speaker: int = 0
    speaks: bool = True


def judge(posts: Sequence[Post | None], wait: float = WAIT) -> Verdict:
    """Return the verdict on what ranks posted; None is a rank that did not."""
    silent = [rank for rank, post in enumerate(posts) if post is None]
    if silent:
        return Verdict(
            "own",
            f"{ranks_named(silent)} did not answer within {wait:.0f} s: is moetuner installed "
            "there, with the same MOETUNER_ variables?",
            silent=True,
            speaker=next((rank for rank, post in enumerate(posts) if post is not None), 0),
        )
    given = [post for post in posts if post is not None]
    first = given[0]
    if first.pending and all(post.pending == first.pending for post in given):
        return Verdict("reload")
    never = "own" if all(post.reloads for post in given) else "off"
    read = [post.files for post in given], [post.unread for post in given]
    decided = [post.map for post in given], [bool(post.error) for post in given]
    for do, what, (values, failures) in (
        (never, "read other files or variables", read),
        ("own", "decided another map", decided),
    ):
        failed = [rank for rank, failure in enumerate(failures) if failure]
        other = [rank for rank, value in enumerate(values) if value != values[0]]
        if failed:
            where = "" if len(failed) == len(given) else f"{ranks_named(failed)}: "
            return Verdict(do, f"{where}{given[failed[0]].error}")
        if other:
            return Verdict(do, f"{ranks_named(other)} {what} than rank 0")
    return Verdict("take")


def ranks_named(ranks: Sequence[int]) -> str:
    """Name ranks in a line: ``rank 1``, or ``ranks 1, 2, 5``."""
    named = ", ".join(map(str, ranks[:MOST_NAMED]))
    more = f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {named}{more}"


class Agreement:
    """Rounds of posts and verdicts of one process: one for each of its decisions."""

    def __init__(self, wait: float | None = None) -> None:
        self.wait = WAIT if wait is None else wait
        self._rounds: dict[tuple[int, ...], int] = {}
        self._silent = 0

    def verdict(
        self, group: Callable[[], Group | None], post: Post, wait: float | None = None
    ) -> Verdict:
        """Return the verdict of all ranks on this rank's post and theirs; it never hangs.

        It never raises either: without the store no rank gets an answer, and all take the engine's
        own map.
        """
        post = replace(post, error=post.error[:LONGEST])
        try:
            ranks = group()
            if ranks is None or len(ranks.ranks) == 1:
                return judge([post])
            verdict = self._round(ranks, post, self.wait if wait is None else wait)
        except Exception as error:
            return Verdict("own", f"ranks cannot compare their maps: {error!r}"[:LONGEST])
        self._silent = self._silent + 1 if verdict.silent else 0
        do = "off" if self._silent >= PATIENCE else verdict.do
        return replace(verdict, do=do, speaks=verdict.speaker == ranks.rank)

    def _round(self, group: Group, post: Post, wait: float) -> Verdict:
        number = self._rounds.get(group.ranks, 0)
        self._rounds[group.ranks] = number + 1
        name = "-".join(map(str, group.ranks))
        store, size = group.store, len(group.ranks)

        def key(of: int) -> str:
            return f"moetuner/{name}/{of}"

        def verdict_of(posts: Sequence[str | None]) -> str:
            given = [None if said is None else Post(**json.loads(said)) for said in posts]
            return json.dumps(asdict(judge(given, wait)))

        verdict, complete = agree(
            store,
            key(number),
            group.rank,
            size,
            post=json.dumps(asdict(post)),
            judge=verdict_of,
            wait=wait,
        )
        if number and complete:
            # All have read the verdict before this one. What is left over harms nobody.
            with contextlib.suppress(Exception):
                for old in keys_of(key(number - 1), size):
                    store.delete_key(old)
        return Verdict(**json.loads(verdict))
