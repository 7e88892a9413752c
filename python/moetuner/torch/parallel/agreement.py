"""Let ranks exchange values before experts move, so that all of them go on or none does."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from moetuner.plugins.consensus import agree, list_keys, verdict_key
from moetuner.plugins.store import ANSWER, TimedStore

T = TypeVar("T")
Failure = Exception | None

# Number of agreements that this process has made, by their ranks.
_agreements: Counter[str] = Counter()


class MoveError(RuntimeError):
    """A move of experts did not take place; the old placement is in force."""


class NoMemoryError(MoveError):
    """A rank has no memory for the weights that would arrive; all ranks answered and know it."""


class DisagreementError(MoveError):
    """Ranks have different values; all ranks answered and know it."""


class Agreement:
    """Exchange values between all ranks of a group, through the store that they joined by.

    Every exchange ends with one verdict, which all ranks follow, so no rank goes on after another
    has given up. A late rank reads the verdict without waiting, and takes part in the next round.
    An exchange waits ``timeout`` seconds for the slowest rank of ``group``; None is all ranks. If
    the store does not answer a rank within ``answer`` seconds, the exchange fails there, and for
    the others when the store answers again. All ranks have to make equally many ``Agreement``.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, timeout: float, answer: float = ANSWER
    ) -> None:
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        name = f"moetuner/{fingerprint(repr(ranks).encode())}"
        _agreements[name] += 1
        self._store = PrefixStore(f"{name}/{_agreements[name]}", _get_default_store())
        self.rank, self.ranks = dist.get_rank(group), len(ranks)
        self.timeout, self.answer = timeout, answer
        # In torch's fake group one process stands for all ranks, and its store keeps nothing.
        self._stands_for_all = dist.get_backend(group) == "fake"
        self._round = self._turn = self._missed = 0
        # Exchanges whose verdict a rank may still have to read.
        self._old_keys: list[str] = []

    def begin(self) -> None:
        """Begin a round of exchanges, which has the same number on every rank.

        A rank that was late catches up round by round. If it has not come nearer since the last
        call, it made fewer calls than the others, and jumps to their round.

        Raises
        ------
        MoveError
            If the store does not answer: the others find that this rank has given up the round.
        """
        self._round, self._turn = self._round + 1, 0
        if self._stands_for_all:
            return
        missed = 0
        with closing(TimedStore(self._store, self.answer)) as store:
            try:
                while store.check([verdict_key(f"{self._round + missed}.0")]):
                    missed += 1
            except (RuntimeError, TimeoutError) as error:
                problem = self._give_up(store, f"{self._round}.0", f"no round of moves: {error}")
                raise MoveError(f"{problem}; the old placement stays in force") from None
        if 0 < self._missed <= missed:
            self._round, missed = self._round + missed, 0
        self._missed = missed

    def exchange(self, subject: str, value: Any = None, failure: Failure = None) -> list[Any]:
        """Return the values of all ranks, which JSON holds; ``subject`` is for messages.

        Every rank raises a ``MoveError`` if one has a ``failure``, is gone or is late.
        """
        key, self._turn = f"{self._round}.{self._turn}", self._turn + 1
        post, judge = json.dumps([value, failure and str(failure)]), partial(self._judge, subject)
        ranks, wait = (self.rank, self.ranks), self.timeout
        with closing(TimedStore(self._store, self.answer)) as store:
            try:
                if self._stands_for_all:
                    verdict, complete = judge([post] * self.ranks), False
                else:
                    verdict, complete = agree(store, key, *ranks, post=post, judge=judge, wait=wait)
                values, problem = json.loads(verdict)
            except (RuntimeError, TimeoutError) as error:
                # The process that serves the store stands still or is gone.
                values, complete = [], False
                why = f"no agreement on {subject}: {failure or error}"
                problem = self._give_up(store, key, why)
            if complete and key.endswith(".0"):
                # All are in this round, so no rank needs the verdicts on earlier ones.
                with suppress(RuntimeError, TimeoutError):
                    for old_key in self._old_keys:
                        for name in list_keys(old_key, self.ranks):
                            store.delete_key(name)
                self._old_keys.clear()
        self._old_keys.append(key)
        if problem:
            raise MoveError(f"{problem}; the old placement stays in force") from failure
        return list(values)

    @staticmethod
    def _give_up(store: TimedStore, key: str, problem: str) -> str:
        """Let the others find this problem as the verdict, once the store answers; return it."""
        store.put_later(verdict_key(key), json.dumps([[], problem]))
        return problem

    def _judge(self, subject: str, posts: Sequence[str | None]) -> str:
        """Return the values of all ranks, and the problem with them, as JSON."""
        silent = [rank for rank, post in enumerate(posts) if post is None]
        answers = [json.loads(post) for post in posts if post is not None]
        failed = {rank: why for rank, (_, why) in enumerate(answers) if why is not None}
        problem = ""
        if silent:
            problem = f"ranks {silent} did not answer on {subject} within {self.timeout:g} s"
        elif failed:
            problem = f"ranks {list(failed)} failed at {subject}: {next(iter(failed.values()))}"
        return json.dumps([[value for value, _ in answers], problem])

    def reach(self, subject: str, value: Any = None, failure: Failure = None) -> None:
        """Raise unless every rank has the same value; parameters are as in ``exchange``."""
        values = self.exchange(subject, value, failure)
        others = [rank for rank, other in enumerate(values) if other != value]
        if others:
            text = f"ranks {others} do not agree with rank {self.rank} on {subject}"
            raise DisagreementError(f"{text}; the old placement stays in force")


def attempt(call: Callable[..., T], *arguments: Any) -> tuple[T | None, Failure]:
    """Return the result of a call and its error, which other ranks can then be told."""
    try:
        return call(*arguments), None
    except Exception as error:
        return None, error


def fingerprint(*parts: bytes) -> str:
    """Return a checksum of parts."""
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
