"""Rounds of a group of ranks, counted in the store that all of them reach: one per question."""

from __future__ import annotations

import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from moetuner.plugins.consensus import list_keys, verdict_key
from moetuner.plugins.verdicts import Verdict, read_verdict


@dataclass(frozen=True)
class Group:
    """The ranks that exchange experts, by their numbers in the whole job.

    All of them reach the ``store`` of ``torch.distributed``. ``rank`` is the place of this one.
    """

    store: Any
    ranks: tuple[int, ...]
    rank: int


class Rounds:
    """The next round of a group, and the verdict before it, as one process sees them.

    A process that was late goes through the rounds that it has missed, each of which has a verdict.
    A process in the place of another one continues with the next round in the store. In a new store
    all ranks start with round 0. The group's store is not kept: an engine may make a new one.
    """

    def __init__(self, group: Group) -> None:
        self.rank, self.size = group.rank, len(group.ranks)
        self.name = "moetuner/" + "-".join(map(str, group.ranks))
        self._next = f"{self.name}/next"
        self.number = 0
        # Verdict of the round before.
        self.last = Verdict()
        # What this process wrote in its place.
        self._token = ""

    @property
    def key(self) -> str:
        """Key of the next round's question in the store."""
        return f"{self.name}/{self.number}"

    def enter(self, store: Any) -> bool:
        """Return whether another process had this rank before, after finding the next round."""
        token = uuid.uuid4().hex
        process = f"{self.name}/process/{self.rank}"
        present = store.compare_set(process, "", token).decode()
        if present == self._token:
            return False
        self._token, self.number, self.last = token, 0, Verdict()
        if present == token:
            store.compare_set(self._next, "", "0")
            return False
        store.set(process, token)
        self.catch_up(store)
        return True

    def catch_up(self, store: Any) -> None:
        """Continue with the next round in the store."""
        number = int(store.compare_set(self._next, "", "0"))
        if number > self.number:
            self.number = number
            last = verdict_key(f"{self.name}/{number - 1}")
            self.last = Verdict()
            if store.check([last]):
                self.last = read_verdict(store.get(last).decode())

    def open(self, store: Any) -> None:
        """Mark the next round as open, so that others take part who have stopped asking."""
        store.set(f"{self.key}/opened", "")

    def is_open(self, store: Any) -> bool:
        """Return whether a process asks the others to take part in the next round."""
        return bool(store.check([f"{self.key}/opened"]))

    def close(self, store: Any, verdict: Verdict, *, complete: bool) -> None:
        """Remember the verdict of this round; if all took part, delete the round before.

        The verdict holds even if the store fails.
        """
        number = self.number
        self.number, self.last = number + 1, verdict
        with suppress(Exception):
            store.compare_set(self._next, str(number), str(number + 1))
            # All have read the verdict before this one. Keys that remain do no harm.
            if complete and number:
                for old in list_keys(f"{self.name}/{number - 1}", self.size):
                    store.delete_key(old)
