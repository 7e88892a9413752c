"""Log lines of the plugins, each warning once, and run work that must not delay an engine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def quote_error(error: BaseException) -> str:
    """Return the text of an error in one line."""
    return " ".join(str(error).split()) or repr(error)


class Log:
    """Lines of one engine's plugin, by the engine's logger, so that they appear among its own."""

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger
        self._once: set[str] = set()

    def say(
        self, text: str, rank: int = 0, level: int = logging.INFO, *, once: bool = False
    ) -> None:
        """Write a line, at DEBUG on ranks other than 0; with ``once``, each text only once."""
        if not (once and text in self._once):
            self.logger.log(logging.DEBUG if rank else level, "moetuner: %s", text)
        if once:
            self._once.add(text)

    def warn(self, text: str, rank: int = 0) -> None:
        """Write a warning once, at DEBUG on ranks other than 0."""
        self.say(text, rank, logging.WARNING, once=True)

    def forget(self, text: str) -> None:
        """Let a text be written again that was written once."""
        self._once.discard(text)


class Background:
    """A thread for work that must not delay the engine; a warning says what failed."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self._thread: ThreadPoolExecutor | None = None

    def run(self, failure: str, work: Callable[..., object], *arguments: Any) -> None:
        """Run work after all work before it; ``failure`` says what is missing if it fails."""

        def attempt() -> None:
            try:
                work(*arguments)
            except Exception as error:
                self.log.warn(f"{failure}: {quote_error(error)}")

        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="moetuner")
        self._thread.submit(attempt)

    def flush(self) -> None:
        """Wait until all work is done."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
