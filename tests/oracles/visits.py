"""Visits of expert sets, device by device and set by set: what `expected.visits` must find."""

import numpy as np


def visits(share, sets, node):
    """Tokens that visit every device [L,D], and every node [L,N], of shares [L,D,E]."""
    layers, devices, _ = share.shape
    nodes = int(node.max()) + 1
    found, of_nodes = np.zeros((layers, devices)), np.zeros((layers, nodes))
    for layer, tokens in enumerate(sets):
        for ids, count in zip(tokens.ids.tolist(), tokens.counts.tolist(), strict=True):
            for device in range(devices):
                missed = np.prod([1 - share[layer, device, expert] for expert in ids])
                found[layer, device] += count * (1 - missed)
            for n in range(nodes):
                mine = [share[layer, node == n, expert].sum() for expert in ids]
                of_nodes[layer, n] += count * (1 - np.prod([1 - each for each in mine]))
    return found, of_nodes
