"""How much memory a device has to spare for experts that arrive."""

from __future__ import annotations

from pathlib import Path

import torch

# The rest is for what the model itself will ask for.
SHARE = 0.5
ENOUGH = 1 << 60  # where nobody can say


def spare_bytes(device: torch.device, sharing: int = 1) -> int:
    """Compute the bytes that buffers may take on a device, half of what is free; never fails.

    Parameters
    ----------
    device
        Where the buffers would be.
    sharing
        Processes that share a host's memory; of a GPU each is taken to have its own.
    """
    try:
        free = _free_bytes(device, sharing)
    except (OSError, RuntimeError, ValueError):
        free = None
    return ENOUGH if free is None else int(free * SHARE)


def _free_bytes(device: torch.device, sharing: int) -> int | None:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch has set aside and nobody uses.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    if device.type == "cpu":
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // sharing
    return None
