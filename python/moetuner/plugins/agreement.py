"""Let all ranks agree on a map, or take the engine's own.

Ranks that serve different maps wait for each other's weights forever. So before a map is returned,
every rank posts its decision and its files, and one verdict holds for all (``consensus``), even if
a rank has no plugin, or another thread of the engine is in a collective.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from moetuner.plugins.consensus import ANSWER, TimedStore, agree, verdict_key
from moetuner.plugins.rounds import Rounds

Message = TypeVar("Message", "Post", "Verdict")

# Goes up when posts change their meaning. Fields ``version``, ``do`` and ``reason`` keep theirs, so
# that ranks of two versions can tell each other that they differ.
VERSION = 1
# Seconds that a rank waits for the others. A rank without the plugin never answers.
WAIT = 30.0
# Consecutive rounds that may fail before ranks stop asking.
PATIENCE = 2
# Seconds that a process in the place of another one waits for ranks that have stopped asking.
WAIT_TO_REOPEN = 1.0
# Most characters of an error in a post.
LONGEST = 400
# Most ranks that a line names.
MOST_NAMED = 8
# Kinds of reasons for which all ranks take the engine's own map.
SILENT, UNREAD, OTHER_FILES = "rank silent", "files unreadable", "files differ"
FAILED, OTHER_MAPS, LATE = "rank failed", "maps differ", "rank late"
NO_STORE, NO_ROUND = "store failed", "round failed"
CAUSES = (SILENT, UNREAD, OTHER_FILES, FAILED, OTHER_MAPS, LATE, NO_STORE, NO_ROUND)


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
    """The decision of a rank.

    Parameters
    ----------
    files
        Checksum of its files and rules.
    map
        Checksum of the map; "" without a map.
    error
        Reason for having no map.
    unread
        True if the error is in the files, so that the next decision has it, too.
    pending
        Checksum of files that were read again; "" if none were.
    reloads
        True if files may be read again.
    version
        Version of the agreement, 0 where a post does not say it.
    """

    files: str = ""
    map: str = ""
    error: str = ""
    unread: bool = False
    pending: str = ""
    reloads: bool = False
    version: int = VERSION


@dataclass(frozen=True)
class Verdict:
    """The action of all ranks: ``take`` the map, ``own`` (the engine's), ``reload``, or ``off``.

    ``off`` means the engine's own map from now on. ``silent`` says that a rank did not answer;
    ``speaker`` is the first rank that did, and ``speaks`` whether this is it. ``map`` is the
    checksum of the taken map, ``failures`` the number of consecutive rounds that failed, and
    ``cause`` the kind of ``reason``, one of ``CAUSES``.
    """

    do: str = "own"
    reason: str = ""
    silent: bool = False
    speaker: int = 0
    speaks: bool = True
    map: str = ""
    failures: int = 0
    cause: str = ""


def judge(posts: Sequence[Post | None], wait: float = WAIT) -> Verdict:
    """Return the verdict on the posts of ranks; None stands for a rank without a post."""
    versions = {rank: post.version for rank, post in enumerate(posts) if post is not None}
    speaker = min(versions, default=0)
    if others := [rank for rank in versions if versions[rank] != versions[speaker]]:
        return Verdict(
            "off",
            f"{name_ranks(others)} and rank {speaker} agree by other versions of moetuner "
            f"({versions[others[0]]} and {versions[speaker]}): install the same on all",
            speaker=speaker,
        )
    silent = [rank for rank, post in enumerate(posts) if post is None]
    if silent:
        return Verdict(
            "own",
            f"{name_ranks(silent)} did not answer within {wait:.0f} s: is moetuner installed "
            "there, with the same MOETUNER_ variables?",
            silent=True,
            speaker=speaker,
            cause=SILENT,
        )
    answers = [post for post in posts if post is not None]
    first = answers[0]
    if first.pending and all(post.pending == first.pending for post in answers):
        return Verdict("reload")
    # Files that are not read again differ in every later decision, too.
    differing = "own" if all(post.reloads for post in answers) else "off"
    unread = [rank for rank, post in enumerate(answers) if post.unread]
    if unread:
        return Verdict(differing, _quote_errors(answers, unread), cause=UNREAD)
    other_files = [rank for rank, post in enumerate(answers) if post.files != first.files]
    if other_files:
        ranks = name_ranks(other_files)
        reason = f"{ranks} read other files or variables than rank 0"
        return Verdict(differing, reason, cause=OTHER_FILES)
    failed = [rank for rank, post in enumerate(answers) if post.error]
    if failed:
        return Verdict("own", _quote_errors(answers, failed), cause=FAILED)
    other_maps = [rank for rank, post in enumerate(answers) if post.map != first.map]
    if other_maps:
        reason = f"{name_ranks(other_maps)} decided another map than rank 0"
        return Verdict("own", reason, cause=OTHER_MAPS)
    return Verdict("take", map=first.map)


def _quote_errors(posts: Sequence[Post], failed: Sequence[int]) -> str:
    """Write the error of the first of the ranks that failed; name them unless all did."""
    ranks = "" if len(failed) == len(posts) else f"{name_ranks(failed)}: "
    return f"{ranks}{posts[failed[0]].error}"


def name_ranks(ranks: Sequence[int]) -> str:
    """Name ranks in a line: ``rank 1``, or ``ranks 1, 2, 5``."""
    named = ", ".join(map(str, ranks[:MOST_NAMED]))
    if len(ranks) > MOST_NAMED:
        named += f" and {len(ranks) - MOST_NAMED} more"
    return f"rank{'s' if len(ranks) > 1 else ''} {named}"


class MapAgreement:
    """Rounds of posts and verdicts of one process, one round per decision.

    Parameters
    ----------
    wait
        Seconds that this process waits for the others' posts, by default ``WAIT``.
    answer
        Seconds that it waits for an answer of the store.
    """

    def __init__(self, wait: float | None = None, answer: float = ANSWER) -> None:
        self.wait, self.answer = WAIT if wait is None else wait, answer
        self._rounds: dict[tuple[int, ...], Rounds] = {}
        # Consecutive rounds in which this process could not take part.
        self._failures = 0

    def verdict(
        self, group: Callable[[], Group | None], post: Post, wait: float | None = None
    ) -> Verdict:
        """Return the verdict of all ranks on this rank's post and theirs.

        It returns after at most three times ``wait`` seconds, or after ``answer`` seconds if the
        store stands still. It never raises: an error of a rank is in its post, and an error with a
        post gives a verdict. Without the store no rank gets an answer, and all take the engine's
        own map.
        """
        post = replace(post, error=post.error[:LONGEST])
        try:
            ranks = group()
            if ranks is None or len(ranks.ranks) == 1:
                return judge([post])
            seconds = self.wait if wait is None else wait
            with closing(TimedStore(ranks.store, self.answer)) as store:
                verdict = self._round(ranks, store, post, seconds)
        except Exception as error:
            self._failures += 1
            do = "off" if self._failures >= PATIENCE else "own"
            return Verdict(do, _cannot_compare(error), cause=NO_STORE)
        self._failures = 0
        return replace(verdict, speaks=verdict.speaker == ranks.rank)

    def is_off(self, group: Callable[[], Group | None]) -> bool:
        """Return whether the verdict ``off`` still holds; it never raises.

        It ends with a new store, which engines make for other ranks, and when a process in the
        place of another one asks again.
        """
        try:
            ranks = group()
            if ranks is None or self._failures >= PATIENCE:
                return True
            rounds = self._rounds.get(ranks.ranks)
            if rounds is None:
                return False
            with closing(TimedStore(ranks.store, self.answer)) as store:
                rounds.enter(store)
                if read_verdict(rounds.verdict).do == "off":
                    rounds.catch_up(store)
                return read_verdict(rounds.verdict).do == "off" and not rounds.is_open(store)
        except Exception:
            return True

    def _round(self, group: Group, store: TimedStore, post: Post, wait: float) -> Verdict:
        size = len(group.ranks)
        name = "moetuner/" + "-".join(map(str, group.ranks))
        rounds = self._rounds.setdefault(group.ranks, Rounds(name, group.rank, size))
        replaces = rounds.enter(store)
        last = read_verdict(rounds.verdict)
        if last.do == "off":
            wait = min(wait, WAIT_TO_REOPEN)
            if replaces:
                rounds.open(store)

        def write_verdict(posts: Sequence[str | None]) -> str:
            try:
                verdict = judge(
                    [_read_post(rank, message) for rank, message in enumerate(posts)], wait
                )
            except Exception as error:
                speaker = next(
                    (rank for rank, message in enumerate(posts) if message is not None), 0
                )
                reason = (str(error) or repr(error))[:LONGEST]
                verdict = Verdict(reason=reason, speaker=speaker, failures=1, cause=NO_ROUND)
            if verdict.silent or verdict.failures:
                failures = 1 if last.do == "off" else last.failures + 1
                do = "off" if failures >= PATIENCE else verdict.do
                verdict = replace(verdict, do=do, failures=failures)
            return to_json(verdict)

        try:
            message, complete = agree(
                store,
                rounds.key,
                group.rank,
                size,
                post=to_json(post),
                judge=write_verdict,
                wait=wait,
                distrusts=_has_other_version,
            )
        except TimeoutError as error:
            # Others may read this rank's post when the store answers again. Then they find this
            # verdict, and do not judge the post.
            reason = _cannot_compare(error)
            lost = Verdict(reason=reason, speaker=group.rank, failures=1, cause=NO_STORE)
            store.put_later(verdict_key(rounds.key), to_json(lost))
            raise
        rounds.close(store, message, complete=complete)
        verdict = read_verdict(message)
        if verdict.do == "take" and verdict.map != post.map:
            # The verdict is on the post of another process that had this rank.
            return Verdict(reason="this rank came too late with another map", cause=LATE)
        return verdict


def to_json(message: Post | Verdict) -> str:
    """Return a message as JSON; if that fails, JSON with the error."""
    try:
        content = asdict(message)
        if isinstance(message, Verdict):
            # Without defaults, so that earlier versions can read as much as possible.
            defaults = asdict(Verdict(do=""))
            content = {name: value for name, value in content.items() if value != defaults[name]}
        return json.dumps(content)
    except Exception as error:
        reasons = {"error": repr(error), "reason": repr(error)}
        return json.dumps({**reasons, "files": getattr(message, "files", ""), "version": VERSION})


def read_message(kind: type[Message], message: str) -> Message:
    """Return a message from JSON, without fields that this version does not know."""
    content = json.loads(message)
    names = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in content.items() if name in names})


def read_verdict(message: str | None) -> Verdict:
    """Return a verdict from JSON; one without sense is the engine's own map."""
    try:
        verdict = Verdict() if message is None else read_message(Verdict, message)
        if verdict.do in ("take", "own", "reload", "off"):
            return verdict
        reason = f"{verdict.do!r} is not a verdict"
    except Exception as error:
        reason = f"the verdict cannot be read: {error!r}"
    return Verdict(reason=reason, failures=1, cause=NO_ROUND)


def _read_post(rank: int, message: str | None) -> Post | None:
    """Return the post of a rank from JSON."""
    if message is None:
        return None
    try:
        return replace(read_message(Post, message), version=json.loads(message).get("version", 0))
    except Exception as error:
        raise ValueError(f"rank {rank}: its post cannot be read: {error!r}") from error


def _cannot_compare(error: Exception) -> str:
    return f"ranks cannot compare their maps: {error!r}"[:LONGEST]


def _has_other_version(message: str) -> bool:
    """Return whether a post is of another version, which may not know how to judge ours."""
    try:
        return bool(json.loads(message).get("version", 0) != VERSION)
    except Exception:
        return True
