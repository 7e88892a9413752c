"""Agreement: what all ranks must say alike before any of them goes on."""

from __future__ import annotations

import hashlib
from datetime import timedelta

import torch
import torch.distributed as dist


class MoveError(RuntimeError):
    """A move of experts did not take place; the old placement is in force."""


class NoRoomError(MoveError):
    """A rank had no memory for what would have arrived; all ranks are there and know it."""


class Agreement:
    """A channel beside the one that moves data, on the host, with a time limit of its own.

    Parameters
    ----------
    group
        The ranks that must agree; None for all. All of them make an ``Agreement`` at once.
    timeout
        Seconds to wait for the slowest rank.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: float) -> None:
        self.timeout = timedelta(seconds=timeout)
        ranks = None if group is None else dist.get_process_group_ranks(group)
        made = dist.new_group(
            ranks, self.timeout, backend="gloo", use_local_synchronization=ranks is not None
        )
        assert isinstance(made, dist.ProcessGroup)
        self.group = made
        self.rank = dist.get_rank(group)

    def reach(
        self,
        about: str,
        value: int = 0,
        failure: Exception | None = None,
        kind: type[MoveError] = MoveError,
    ) -> None:
        """Wait until every rank says that it has not failed and means the same value.

        Parameters
        ----------
        about
            What is agreed on, for the message.
        value
            Fingerprint of it, 63 bits.
        failure
            What has gone wrong on this rank, if anything.
        kind
            Of the error, where a rank has failed.

        Raises
        ------
        MoveError
            On every rank, if one has failed, differs, is gone or does not answer in time.
        """
        mine = torch.tensor([failure is not None, value], dtype=torch.int64)
        said = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        try:
            work = dist.all_gather(said, mine, group=self.group, async_op=True)
            assert work is not None
            work.wait(self.timeout)
        except RuntimeError as error:
            raise MoveError(
                f"no agreement on {about} within {self.timeout.total_seconds():g} s, a rank is "
                f"gone or stuck; the old placement stays in force: {failure or error}"
            ) from (failure or error)
        failed = [rank for rank, words in enumerate(said) if words[0]]
        if failed:
            why = f": {failure}" if failure else ""
            raise kind(
                f"ranks {failed} failed at {about}; the old placement stays in force{why}"
            ) from failure
        others = [rank for rank, words in enumerate(said) if words[1] != value]
        if others:
            raise MoveError(
                f"ranks {others} do not agree with rank {self.rank} on {about}; "
                "the old placement stays in force"
            )

    def largest(self, about: str, value: int) -> int:
        """Give the largest value of any rank.

        Raises
        ------
        MoveError
            On every rank that is left, if one is gone or does not answer in time.
        """
        most = torch.tensor([value], dtype=torch.int64)
        try:
            work = dist.all_reduce(most, dist.ReduceOp.MAX, self.group, async_op=True)
            if work is not None:
                work.wait(self.timeout)
        except RuntimeError as error:
            raise MoveError(
                f"no agreement on {about} within {self.timeout.total_seconds():g} s, a rank is "
                f"gone or stuck; the old placement stays in force: {error}"
            ) from error
        return int(most)


def fingerprint(*parts: bytes) -> int:
    """Give 63 bits that equal parts share."""
    digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
    return int.from_bytes(digest[:8], "little") >> 1
