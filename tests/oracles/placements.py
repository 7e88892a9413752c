"""Placements of all kinds. Only numpy is imported here: processes of the torch tests need it."""

import numpy as np


def random_slots(rng, layers, devices, experts, spare):
    """Slots [L,D,S] in which every expert has a copy, some have several, and some are empty."""
    width = -(-experts // devices) + spare
    slots = np.full((layers, devices, width), -1)
    for layer in slots:
        for i, expert in enumerate(rng.permutation(experts)):
            layer[i % devices, i // devices] = expert
        for device, slot in np.argwhere(layer == -1):
            expert = rng.integers(-1, experts)
            if expert not in layer[device]:
                layer[device, slot] = expert
        rng.shuffle(layer, axis=0)
    return slots


def murmur(bits):
    """Mix 32 bits as the end of MurmurHash3 does."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits = (bits ^ bits >> shift) * factor % 2**32
    return bits


def full_slots(seed):
    """Slots [L,D,S] of any size without an empty one, and how many experts there are."""
    rng = np.random.default_rng(seed)
    layers, devices = (int(rng.integers(1, 5)) for _ in range(2))
    experts = int(rng.integers(devices, 14))
    width = min(-(-experts // devices) + int(rng.integers(0, 3)), experts)
    slots = np.empty((layers, devices, width), dtype=int)
    for layer in slots:
        order = rng.permutation(experts)
        for device, row in enumerate(layer):
            mine = order[device::devices]
            others = rng.permutation(np.setdiff1d(order, mine))[: width - len(mine)]
            row[:] = rng.permutation(np.concatenate([mine, others]))
    return slots, experts
