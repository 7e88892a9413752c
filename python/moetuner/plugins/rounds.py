"""Rounds of a group of ranks, counted in the store that all of them reach."""

from __future__ import annotations

import uuid
from contextlib import suppress
from typing import Any

from moetuner.plugins.consensus import list_keys, verdict_key


class Rounds:
    """The next round of a group, from the view of one process.

    A process that was late goes through the rounds that it has missed, each of which has a verdict.
    A process in the place of another one continues with the next round in the store. In a new store
    all ranks start with round 0.

    Parameters
    ----------
    name
        Name of the group in the store.
    rank
        The place of this process in the group.
    size
        Number of ranks.
    """

    def __init__(self, name: str, rank: int, size: int) -> None:
        self.name, self.rank, self.size = name, rank, size
        self.number = 0
        # Verdict of the round before.
        self.verdict: str | None = None
        self._token = ""

    @property
    def key(self) -> str:
        """Key of the next round's question in the store."""
        return f"{self.name}/{self.number}"

    @property
    def _next(self) -> str:
        return f"{self.name}/next"

    @property
    def _opened(self) -> str:
        return f"{self.key}/opened"

    def enter(self, store: Any) -> bool:
        """Find the next round; return whether another process had this rank before."""
        token = uuid.uuid4().hex
        process = f"{self.name}/process/{self.rank}"
        present = store.compare_set(process, "", token).decode()
        if present == self._token:
            return False
        self._token, self.number, self.verdict = token, 0, None
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
            last = verdict_key(f"{self.name}/{number - 1}")
            self.number = number
            self.verdict = store.get(last).decode() if store.check([last]) else None

    def open(self, store: Any) -> None:
        """Mark the next round as open, so that others take part who have stopped asking."""
        store.set(self._opened, "")

    def is_open(self, store: Any) -> bool:
        """Return whether a process asks the others to take part in the next round."""
        return bool(store.check([self._opened]))

    def close(self, store: Any, verdict: str, *, complete: bool) -> None:
        """Remember the verdict of this round; if all took part, delete the round before.

        The verdict holds even if the store fails.
        """
        number, size = self.number, self.size
        self.number, self.verdict = number + 1, verdict
        with suppress(Exception):
            store.compare_set(self._next, str(number), str(number + 1))
            # All have read the verdict before this one. Keys that remain do no harm.
            if complete and number:
                for old in list_keys(f"{self.name}/{number - 1}", size):
                    store.delete_key(old)
