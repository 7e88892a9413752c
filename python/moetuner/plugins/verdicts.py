"""What ranks post, what holds for all of them, and how a store carries both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

# Goes up when posts change their meaning. Fields ``version``, ``do`` and ``reason`` keep theirs, so
# that ranks of two versions can tell each other that they differ.
VERSION = 1
# Seconds that a rank waits for the others. A rank without the plugin never answers.
WAIT = 30.0
# Consecutive rounds that may fail before ranks stop asking.
PATIENCE = 2
# Most characters of an error in a post.
LONGEST = 400
# Most ranks that a line names.
MOST_NAMED = 8
# Kinds of reasons for which all ranks take the engine's own map.
SILENT, UNREAD, OTHER_FILES = "rank silent", "files unreadable", "files differ"
FAILED, OTHER_MAPS, LATE = "rank failed", "maps differ", "rank late"
NO_STORE, NO_ROUND, OTHER = "store failed", "round failed", "other"
CAUSES = (SILENT, UNREAD, OTHER_FILES, FAILED, OTHER_MAPS, LATE, NO_STORE, NO_ROUND, OTHER)
# The engine's own map is right where the files have nothing for a draft model.
NO_DRAFT = "draft model without a file"

Action = Literal["take", "own", "reload", "off"]


@dataclass(frozen=True)
class Post:
    """The decision of a rank: checksums of its ``files`` and rules, and of the ``map``.

    Without a map, ``error`` is the reason. ``unread`` says that it is in the files, so that the
    next decision has it, too; ``no_draft`` that the files have nothing for a draft model.
    ``reloads`` says whether files may be read again, and ``pending`` is the checksum of those that
    were. ``version`` is that of the agreement, 0 where a post does not say it.
    """

    files: str = ""
    map: str = ""
    error: str = ""
    unread: bool = False
    no_draft: bool = False
    pending: str = ""
    reloads: bool = False
    version: int = VERSION


@dataclass(frozen=True)
class Verdict:
    """The action of all ranks: ``take`` the map, ``own`` (the engine's), ``reload``, or ``off``.

    ``off`` means the engine's own map from now on. ``silent`` says that a rank did not answer;
    ``speaker`` is the first rank that did, and ``speaks`` whether this is it. ``map`` is the
    checksum of the taken map, ``failures`` the number of consecutive rounds that failed, and
    ``cause`` the kind of ``reason``: ``NO_DRAFT``, or one of ``CAUSES``.
    """

    do: Action = "own"
    reason: str = ""
    silent: bool = False
    speaker: int = 0
    speaks: bool = True
    map: str = ""
    failures: int = 0
    cause: str = ""


def judge(posts: Sequence[Post | None], wait: float = WAIT) -> Verdict:
    """Return the verdict on the posts of ranks; None stands for a rank without a post."""
    answers = {rank: post for rank, post in enumerate(posts) if post is not None}
    speaker = find_speaker(posts)
    first = answers.get(speaker, Post())

    def find_differing(name: str) -> list[int]:
        return [
            rank for rank, post in answers.items() if getattr(post, name) != getattr(first, name)
        ]

    if others := find_differing("version"):
        reason = (
            f"{name_ranks(others)} and rank {speaker} agree by other versions of moetuner "
            f"({answers[others[0]].version} and {first.version}): install the same on all"
        )
        return Verdict("off", reason, speaker=speaker)
    if silent := [rank for rank, post in enumerate(posts) if post is None]:
        reason = (
            f"{name_ranks(silent)} did not answer within {wait:.0f} s: is moetuner installed "
            "there, with the same MOETUNER_ variables?"
        )
        return Verdict("own", reason, silent=True, speaker=speaker, cause=SILENT)
    if first.pending and not find_differing("pending"):
        return Verdict("reload")
    # Files that are not read again differ in every later decision, too.
    by_files: Action = "own" if all(post.reloads for post in answers.values()) else "off"
    if unread := [rank for rank, post in answers.items() if post.unread]:
        return Verdict(by_files, _quote_error(answers, unread), cause=UNREAD)
    if others := find_differing("files"):
        reason = f"{name_ranks(others)} read other files or variables than rank 0"
        return Verdict(by_files, reason, cause=OTHER_FILES)
    if failed := [rank for rank, post in answers.items() if post.error]:
        cause = NO_DRAFT if all(post.no_draft for post in answers.values()) else FAILED
        return Verdict("own", _quote_error(answers, failed), cause=cause)
    if others := find_differing("map"):
        reason = f"{name_ranks(others)} decided another map than rank 0"
        return Verdict("own", reason, cause=OTHER_MAPS)
    return Verdict("take", map=first.map)


def judge_messages(last: Verdict, wait: float, messages: Sequence[str | None]) -> str:
    """Return the verdict on posts as JSON; an error of judging is one, too.

    ``last`` is the verdict before it: if as many rounds failed as may fail, ranks stop asking.
    """
    try:
        posts = [
            None if message is None else read_post(rank, message)
            for rank, message in enumerate(messages)
        ]
        verdict = judge(posts, wait)
    except Exception as error:
        reason = (str(error) or repr(error))[:LONGEST]
        speaker = find_speaker(messages)
        verdict = Verdict(reason=reason, speaker=speaker, failures=1, cause=NO_ROUND)
    if verdict.silent or verdict.failures:
        failures = 1 if last.do == "off" else last.failures + 1
        do = "off" if failures >= PATIENCE else verdict.do
        verdict = replace(verdict, do=do, failures=failures)
    return to_json(verdict)


def find_speaker(posts: Sequence[object | None]) -> int:
    """Return the first rank with a post; 0 without any."""
    return next((rank for rank, post in enumerate(posts) if post is not None), 0)


def _quote_error(posts: dict[int, Post], failed: Sequence[int]) -> str:
    """Return the error of the first of the ranks that failed; name them unless all did."""
    ranks = "" if len(failed) == len(posts) else f"{name_ranks(failed)}: "
    return f"{ranks}{posts[failed[0]].error}"


def name_ranks(ranks: Sequence[int]) -> str:
    """Return the names of ranks in a line: ``rank 1``, or ``ranks 1, 2, 5``."""
    named = ", ".join(map(str, ranks[:MOST_NAMED]))
    if len(ranks) > MOST_NAMED:
        named += f" and {len(ranks) - MOST_NAMED} more"
    return f"rank{'s' if len(ranks) > 1 else ''} {named}"


def to_json(message: Post | Verdict) -> str:
    """Return a message as JSON, without defaults, so that earlier versions read it."""
    defaults = asdict(type(message)()) | {"do": None, "version": None}
    content = asdict(message)
    return json.dumps({name: content[name] for name in content if content[name] != defaults[name]})


def read_post(rank: int, message: str) -> Post:
    """Return the post of a rank from JSON; raise an error that names the rank."""
    try:
        return Post(**({"version": 0} | _read_fields(Post, message)))
    except Exception as error:
        raise ValueError(f"rank {rank}: its post cannot be read: {error!r}") from error


def read_verdict(message: str) -> Verdict:
    """Return a verdict from JSON; one without sense is the engine's own map."""
    try:
        verdict = Verdict(**_read_fields(Verdict, message))
        if verdict.do in get_args(Action):
            return verdict
        reason = f"{verdict.do!r} is not a verdict"
    except Exception as error:
        reason = f"the verdict cannot be read: {error!r}"
    return Verdict(reason=reason, failures=1, cause=NO_ROUND)


def _read_fields(kind: type[Post | Verdict], message: str) -> dict[str, Any]:
    """Return the fields of a message in JSON, without those that this version does not know."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in json.loads(message).items() if name in names}


def has_other_version(message: str) -> bool:
    """Return whether a post is of another version, which may not know how to judge ours."""
    try:
        return read_post(0, message).version != VERSION
    except ValueError:
        return True
