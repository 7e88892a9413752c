"""Answers beyond those of the self-test: its loops under other rules, and their stored hashes.

``python tests/selftest/rules.py`` stores the hashes anew, after a change that is meant to change
an answer.
"""

import json
from functools import partial
from pathlib import Path

from moetuner.plugins.decision import rebalance_experts
from moetuner.problem import Problem
from moetuner.selftest import hash_of
from moetuner.selftest.cases import BALANCE, FOLLOW, STEPS, TRAFFIC, Traffic, make_loads, place
from moetuner.solver import solve
from moetuner.topology import Topology

STORED = Path(__file__).with_name("answers.json")
# They leave one device to an expert, in all layers.
BANS = [(None, 0, 0), (None, 0, 1), (None, 0, 2), (0, 5, 0)]


def move(traffic, **arguments):
    """Return slots a few moves away from contiguous ones."""
    problem = Problem(traffic.statistics["small"], Topology(4), **arguments)
    running = solve(problem, "contiguous", threads=traffic.threads).placement
    how = {"iterations": STEPS, "threads": traffic.threads, "move_budget": 12}
    return [solve(problem, "joint", initial=running, **how).placement.slots]


def place_at_speeds(traffic):
    """Return slots where two devices have half the speed."""
    topology = Topology(4, speed=[1.0, 1.0, 0.5, 0.5])
    problem = Problem(traffic.statistics["small"], topology, **BALANCE)
    return [solve(problem, iterations=STEPS, threads=traffic.threads).placement.slots]


def decide(_, *, windows=1, again=True, dead=()):
    """Return a decision of the policy: its first, or the next one."""
    before, after = make_loads(windows, 8, 64)
    running = rebalance_experts(before, 80, None, 2, 8)
    return [rebalance_experts(after, 80, None, 2, 8, running, dead=dead) if again else running]


CASES = {
    "lpt, balance": place("middle", "lpt", **BALANCE),
    "eplb, balance, nodes": place("middle", "eplb", 2, 8, **BALANCE),
    "quick, balance": place("wide", "quick", 1, 16, **BALANCE),
    "joint, balance": place("middle", "joint", 1, 8, **BALANCE),
    "joint, balance, groups": place("small", "joint", **BALANCE, groups="minimax"),
    "joint, balance, speeds": place_at_speeds,
    "joint, balance, survive": place(
        "small", "joint", 2, 4, **BALANCE, slots_per_device=8, survive="device"
    ),
    "joint, traffic, nodes": place("small", "joint", 2, 4, **TRAFFIC),
    "joint, traffic, follow": place("small", "joint", **FOLLOW),
    "joint, traffic, bans": place("small", "joint", **FOLLOW, forbidden=BANS),
    "joint, balance, moves": partial(move, **BALANCE),
    "joint, time, moves": move,
    "policy, from nothing": partial(decide, again=False),
    "policy, windows": partial(decide, windows=8),
    "policy, a lost rank": partial(decide, dead=(3,)),
}


def compute_hashes(threads=None):
    """Compute the hash of every case's answer."""
    traffic = Traffic(threads)
    return {name: hash_of(case(traffic)) for name, case in CASES.items()}


if __name__ == "__main__":
    STORED.write_text(json.dumps(compute_hashes(), indent=2) + "\n")
