"""Propose a map by the files of this rank, which may be read again while it serves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.plugins.decision import Case, Slots
from moetuner.plugins.files import Files, Stored, compute_checksum
from moetuner.plugins.log import Log, quote_error
from moetuner.plugins.settings import Settings
from moetuner.plugins.verdicts import Post

# Seconds between two looks at the file of MOETUNER_RELOAD.
LOOK_SECONDS = 0.5
# Function from a map [L,P] to an engine's form; it may refuse the map by raising.
Form = Callable[[NDArray[np.int64]], Any]
# Only one thread reads files again at a time; a second caller then finds that they are read.
READING = threading.Lock()


@dataclass(frozen=True)
class Proposal:
    """A map that this rank would serve: ``slots`` [L,D,S], and ``answer`` in the engine's form.

    ``stored`` is the placement that it is of; None if it follows the loads of the case.
    """

    case: Case
    slots: Slots
    stored: Stored | None
    answer: Any


# A map, None without one, and the post that says why.
Proposed = tuple[Proposal | None, Post]


class Proposer:
    """Proposals of one rank by its files, and by those that it has read again."""

    def __init__(self, settings: Settings, files: Files, log: Log) -> None:
        self.settings, self.files, self.log = settings, files, log
        # Files that were read again, and those of them that the last post had.
        self._pending: Files | None = None
        self._offered: Files | None = None
        self._seen = _signature(settings.reload)
        self._is_watched = False
        # The last case of every model, by its layers, experts and name.
        self._cases: dict[tuple[int, int, str | None], Case] = {}
        self._rank = 0

    def propose(
        self, make_case: Callable[[], Case], model: str | None, form: Form, rank: int
    ) -> Proposed:
        """Return the map for a case of a model, None without one, and the post that says why."""
        files, pending = self.files, self._pending
        self._rank, self._offered = rank, None
        post = Post(files.checksum, reloads=self.settings.reload is not None)
        try:
            case, stored = make_case(), None
            if pending is not None and self._serves(pending, case, model, form):
                self._offered, post = pending, replace(post, pending=pending.checksum)
            if files.error:
                return None, replace(post, error=files.error, unread=True)
            sizes = len(case.slots), case.experts, model
            self._cases[sizes] = replace(case, windows=case.load[None])
            if files.lack_draft(case, model):
                error = "no file is of the draft model's layers"
                return None, replace(post, error=error, no_draft=True)
            if files.placements:
                stored, slots = files.slots(case, model)
                if text := stored.warning(model):
                    self.log.warn(text, rank)
            else:
                slots = case.rebalance(self.settings.rules, files.profile).slots
            full = case.make_map(slots)
            answer = form(full)
        except Exception as error:
            return None, replace(post, error=quote_error(error))
        slots = full.astype(np.int32).reshape(case.slots.shape)
        post = replace(post, map=compute_checksum(slots.tobytes()))
        return Proposal(case, slots, stored, answer), post

    def _serves(self, pending: Files, case: Case, model: str | None, form: Form) -> bool:
        """Return whether files that were read again serve all models here; warn if they do not.

        These are the model of the case, and every other one that the files in use can serve.
        """
        rules = self.settings.rules
        if pending.lack_draft(case, model) and self.files.fault(case, model, rules):
            # A draft model that had nothing before needs nothing now.
            return False
        why = pending.fault(case, model, rules)
        if pending.placements and not why:
            try:
                form(case.make_map(pending.slots(case, model)[1]))
            except Exception as error:
                why = quote_error(error)
        for (*_, name), other in self._cases.items():
            if not why and not self.files.fault(other, name, rules):
                why = pending.fault(other, name, rules)
        if why:
            self._warn_not_taken(why)
        return not why

    def take_offered(self) -> bool:
        """Return whether the last post had files that were read again; use them from now on."""
        if self._offered is None:
            return False
        self.files = self._offered
        if self._pending is self._offered:
            self._pending = None
        return True

    def watch(self) -> None:
        """Look at the file of MOETUNER_RELOAD from now on, in the process that decides."""
        if self.settings.reload is not None and not self._is_watched:
            self._is_watched = True
            threading.Thread(target=self._watch, name="moetuner-reload", daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.look_again()
            time.sleep(LOOK_SECONDS)

    def look_again(self) -> None:
        """Read the files again if that of MOETUNER_RELOAD changed, for the next decision."""
        with READING:
            seen = _signature(self.settings.reload)
            if seen == self._seen:
                return
            self._seen = seen
            files = Files.read(self.settings)
            if files.error:
                self._warn_not_taken(files.error)
            self._pending = files

    def _warn_not_taken(self, why: str) -> None:
        self.log.warn(f"read again, not taken: {why}", self._rank)


def _signature(path: Path | None) -> tuple[int, ...] | None:
    """Return time, size and inode of a file, which change when it does; None if it is missing."""
    if path is not None:
        with suppress(OSError):
            status = path.stat()
            return (status.st_mtime_ns, status.st_size, status.st_ino)
    return None
