"""What is expected of a placement, one number after the other: what the core must find."""

import math

import numpy as np


def shares(placement, topology, split):
    """Share of every expert's tokens that a device serves [L,D,E], of one home after the other."""
    slots, node = placement.slots, topology.node_of_device
    share = np.zeros((*slots.shape[:2], placement.num_experts))
    for layer, home, expert in np.ndindex(share.shape):
        serving = [d for d, row in enumerate(slots[layer].tolist()) if expert in row]
        if split == "nearest":
            near = [d for d in serving if node[d] == node[home]]
            serving = [home] if home in serving else near or serving
        share[layer, serving, expert] += 1 / (slots.shape[1] * len(serving))
    return share


def visits(share, sets, node):
    """Tokens that visit every device [L,D], and every node [L,N], of shares [L,D,E]."""
    layers, devices, _ = share.shape
    nodes = int(node.max()) + 1
    copies, of_nodes = np.zeros((layers, devices)), np.zeros((layers, nodes))
    for layer, tokens in enumerate(sets):
        for ids, count in zip(tokens.ids.tolist(), tokens.counts.tolist(), strict=True):
            for device in range(devices):
                missed = np.prod([1 - share[layer, device, expert] for expert in ids])
                copies[layer, device] += count * (1 - missed)
            for n in range(nodes):
                mine = [share[layer, node == n, expert].sum() for expert in ids]
                of_nodes[layer, n] += count * (1 - np.prod([1 - each for each in mine]))
    return copies, of_nodes


def hashed_visits(slots, sets, node):
    """Tokens that visit devices [L,D] and nodes [L,N], hash by hash, of slots [L,D,S]."""
    layers, devices, _ = slots.shape
    copies, of_nodes = np.zeros((layers, devices)), np.zeros((layers, int(node.max()) + 1))
    for layer, tokens in enumerate(sets):
        holders = [np.flatnonzero((slots[layer] == e).any(axis=1)) for e in range(slots.max() + 1)]
        for ids, count in zip(tokens.ids.tolist(), tokens.counts.tolist(), strict=True):
            period = math.lcm(*(len(holders[expert]) for expert in ids))
            for hashed in range(period):
                chosen = {holders[expert][hashed % len(holders[expert])] for expert in ids}
                copies[layer, sorted(chosen)] += count / period
                of_nodes[layer, sorted({node[device] for device in chosen})] += count / period
    return copies, of_nodes


def load(share, tokens):
    """Tokens of every device [W,L,D], of those of experts [W,L,E]."""
    return np.einsum("lde,wle->wld", share, tokens)


def apart(share, pairs):
    """Pairs [L] whose experts are not served by one device, of counts [L,E,E] in both orders."""
    together = np.einsum("lde,ldf->lef", share, share)
    return (pairs * (1 - together)).sum(axis=(1, 2)) / 2


def followed(share, transitions):
    """Pairs of neighbouring layers by their devices [L-1,D,D], of counts [L-1,E,E]."""
    return np.einsum("lde,lef,lgf->ldg", share[:-1], transitions, share[1:])


def cost(device_of, there, pairs, link_cost):
    """Whole cost of counts [N,E,E] of pairs over links [D,D], pair by pair."""
    total = 0
    for layer, e, f in np.ndindex(pairs.shape):
        total += int(pairs[layer, e, f]) * int(link_cost[device_of[layer, e], there[layer, f]])
    return total
