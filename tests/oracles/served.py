"""What a placement does to tokens, one after the other: what the replay must count."""

import numpy as np
from placements import murmur


def serving(slots, expert, nodes, token, split, *, turn=0, home=None):
    """Choose the device that serves a token of an expert, of those with a copy in slots [D,S]."""
    copies, hashed = np.repeat(np.arange(len(slots)), (slots == expert).sum(axis=1)), murmur(token)
    if split == "round_robin":
        return copies[turn % len(copies)]
    if split == "nearest":
        home = hashed * len(nodes) >> 32 if home is None else home
        if home in copies:
            return home
        near = np.array(nodes)[copies] == nodes[home]
        copies = copies[near] if near.any() else copies
    return copies[hashed % len(copies)]


def replayed(slots, ids, nodes, window, split="even"):
    """Load [W,L,D], follow [L-1,D,D], visits [W,L,D] and node visits [W,L,N] of ids [T,L,K]."""
    (tokens, layers, _), devices = ids.shape, slots.shape[1]
    windows = max(-(-tokens // window), 1) if window else 1
    load = np.zeros((windows, layers, devices), dtype=int)
    follow = np.zeros((layers - 1, devices, devices), dtype=int)
    visits, turn = np.zeros_like(load), np.zeros((layers, slots.max() + 1), dtype=int)
    node_visits = np.zeros((windows, layers, max(nodes) + 1), dtype=int)
    for t, token in enumerate(ids.tolist()):
        before, at = [], t // window if window else 0
        for layer, experts in enumerate(token):
            here = []
            for expert in experts:
                how = {"turn": turn[layer, expert]}
                here.append(serving(slots[layer], expert, nodes, t, split, **how))
                turn[layer, expert] += 1
                load[at, layer, here[-1]] += 1
            visits[at, layer, list(set(here))] += 1
            node_visits[at, layer, list({nodes[device] for device in here})] += 1
            for a in before:
                for b in here:
                    follow[layer - 1, a, b] += 1
            before = here
    return load, follow, visits, node_visits


def rows(slots, ids, home, node, split, *, hierarchical):
    """Rows [L,D,D] that leave their homes [T], to devices in nodes of so many or through nodes."""
    layers, devices, _ = slots.shape
    sent, nodes = np.zeros((layers, devices, devices), dtype=int), np.arange(devices) // node
    for t, layer in np.ndindex(ids.shape[:2]):
        own, crossed = home[t], set()
        visited = {
            serving(slots[layer], expert, nodes, t, split, home=own) for expert in ids[t, layer]
        }
        for device in visited:
            gateway = device // node * node + own % node if hierarchical else own
            crossed.add(gateway)
            sent[layer, gateway, device] += 1
        for gateway in crossed if hierarchical else ():
            sent[layer, own, gateway] += 1
    sent[:, range(devices), range(devices)] = 0
    return sent
