"""Work of one process in the tests of counters over ranks; imports little, as each one waits."""

import torch
import torch.distributed as dist
from conftest import random_ids

from moetuner.torch.record.counters import RoutingCounters

# The last rank has no token at all, the first more windows than the others.
TOKENS = (35, 20, 0)


def work(number, port, results):
    """Fail to sum counters of different sizes, then count a share of tokens and sum over all."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=len(TOKENS)
    )
    text = "no error"
    try:
        RoutingCounters(3 - number % 2, 8, 2).all_reduce()
    except ValueError as error:
        text = str(error)
    counters = RoutingCounters(3, 8, 2, window=10)
    counters.update(torch.from_numpy(random_ids(TOKENS[number], 3, 2, 8, seed=number)))
    total = counters.all_reduce().statistics()
    own = int(counters.statistics().total_load.sum())
    results.put((number, text, own, total.fingerprint, total.windows, total.window))
    dist.destroy_process_group()
