"""What the ranks of a process group must agree on before they add anything up."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist


def largest_on_ranks(
    value: int,
    settings: Mapping[str, int],
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> int:
    """Give the largest value of any rank, once it is clear that all have the same settings.

    Parameters
    ----------
    value
        What may differ.
    settings
        What may not, by name; every rank gives the same names.
    device
        Where the group can exchange tensors.
    group
        The ranks, all of which must call; None is all there are.

    Raises
    ------
    ValueError
        On every rank, naming the settings that differ.
    """
    ours = list(settings.values())
    # The largest of a number and of its negative: the range, in one exchange.
    most = torch.tensor([value, *ours, *(-setting for setting in ours)], device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX, group)
    largest, *found = most.tolist()
    high, low = found[: len(ours)], [-setting for setting in found[len(ours) :]]
    differing = [
        f"{name} from {a} to {b}" for name, a, b in zip(settings, low, high, strict=True) if a != b
    ]
    if differing:
        raise ValueError(f"ranks must count alike, got {', '.join(differing)}")
    return int(largest)
