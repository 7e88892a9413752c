"""Let all ranks agree on a map, or take the engine's own.

Ranks that serve different maps wait for each other's weights forever. So before a map is returned,
every rank posts its decision and its files (``verdicts``), and one verdict holds for all
(``consensus``), even if a rank has no plugin, or another thread of the engine is in a collective.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial

from moetuner.plugins import verdicts
from moetuner.plugins.consensus import agree, verdict_key
from moetuner.plugins.rounds import Group, Rounds
from moetuner.plugins.store import ANSWER, TimedStore
from moetuner.plugins.verdicts import Post, Verdict

# Seconds that a process in the place of another one waits for ranks that have stopped asking.
WAIT_TO_REOPEN = 1.0

# Returns the ranks that exchange experts; None if this process is alone.
FindGroup = Callable[[], Group | None]


class MapAgreement:
    """Verdicts of all ranks on the posts of one process and theirs, one round per decision.

    It waits ``wait`` seconds for the others' posts, and ``answer`` seconds for the store's answers.
    """

    def __init__(self, wait: float | None = None, answer: float = ANSWER) -> None:
        self.wait, self.answer = verdicts.WAIT if wait is None else wait, answer
        self._rounds: dict[tuple[int, ...], Rounds] = {}
        # Consecutive rounds in which this process could not take part.
        self._failures = 0

    def verdict(self, find_group: FindGroup, post: Post, wait: float | None = None) -> Verdict:
        """Return the verdict of all ranks on this rank's post and theirs.

        It returns after at most three times ``wait`` seconds, or after ``answer`` seconds if the
        store stands still. It never raises: an error of a rank is in its post, and an error with a
        post gives a verdict. Without the store no rank gets an answer, and all take the engine's
        own map.
        """
        post = replace(post, error=post.error[: verdicts.LONGEST])
        try:
            group = find_group()
            if group is None or len(group.ranks) == 1:
                return verdicts.judge([post])
            seconds = self.wait if wait is None else wait
            with closing(TimedStore(group.store, self.answer)) as store:
                verdict = self._ask(group, store, post, seconds)
        except Exception as error:
            self._failures += 1
            lost = _lose_round(error)
            return replace(lost, do="off") if self._failures >= verdicts.PATIENCE else lost
        self._failures = 0
        return replace(verdict, speaks=verdict.speaker == group.rank)

    def is_off(self, find_group: FindGroup) -> bool:
        """Return whether the verdict ``off`` still holds; it never raises.

        It ends with a new store, which engines make for other ranks, and when a process in the
        place of another one asks again.
        """
        try:
            group = find_group()
            if group is None or self._failures >= verdicts.PATIENCE:
                return True
            rounds = self._rounds.get(group.ranks)
            if rounds is None:
                return False
            with closing(TimedStore(group.store, self.answer)) as store:
                rounds.enter(store)
                if rounds.last.do == "off":
                    rounds.catch_up(store)
                return rounds.last.do == "off" and not rounds.is_open(store)
        except Exception:
            return True

    def _ask(self, group: Group, store: TimedStore, post: Post, wait: float) -> Verdict:
        """Return the verdict of the next round; raise if the store fails."""
        rounds = self._rounds.setdefault(group.ranks, Rounds(group))
        replaces = rounds.enter(store)
        if rounds.last.do == "off":
            wait = min(wait, WAIT_TO_REOPEN)
            if replaces:
                rounds.open(store)
        try:
            answer, complete = agree(
                store,
                rounds.key,
                group.rank,
                len(group.ranks),
                post=verdicts.to_json(post),
                judge=partial(verdicts.judge_messages, rounds.last, wait),
                wait=wait,
                distrusts=verdicts.has_other_version,
            )
        except TimeoutError as error:
            # Others may read this rank's post when the store answers again. Then they find this
            # verdict, and do not judge the post.
            lost = replace(_lose_round(error), speaker=group.rank, failures=1)
            store.put_later(verdict_key(rounds.key), verdicts.to_json(lost))
            raise
        verdict = verdicts.read_verdict(answer)
        rounds.close(store, verdict, complete=complete)
        if verdict.do == "take" and verdict.map != post.map:
            # The verdict is on the post of another process that had this rank.
            return Verdict(reason="this rank came too late with another map", cause=verdicts.LATE)
        return verdict


def _lose_round(error: Exception) -> Verdict:
    """Return the verdict of a rank that cannot take part in a round."""
    return Verdict(
        reason=f"ranks cannot compare their maps: {error!r}"[: verdicts.LONGEST],
        cause=verdicts.NO_STORE,
    )
