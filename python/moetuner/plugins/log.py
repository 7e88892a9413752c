"""Log lines of the plugins, each warning once."""

from __future__ import annotations

import logging


def quote_error(error: BaseException) -> str:
    """Return the text of an error in one line."""
    return " ".join(str(error).split()) or repr(error)


class Log:
    """Lines of one engine's plugin.

    Parameters
    ----------
    logger
        The engine's logger, so that lines appear among its own.
    """

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
