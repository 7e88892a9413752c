"""The methods: each is a list of stages. `stages.moves` has those from a placement that runs."""

from __future__ import annotations

from typing import Literal

from moetuner.solver.bounds.loads import LOAD_BOUND
from moetuner.solver.bounds.pairs import PAIR_BOUND
from moetuner.solver.bounds.visits import VISIT_BOUND
from moetuner.solver.run import Stage
from moetuner.solver.stages import PARTITIONS, SEARCH, baselines
from moetuner.solver.stages.floor import BALANCE_WINDOWS, FLOOR, FLOOR_OF_WINDOWS
from moetuner.solver.two_stage import PAPER

Method = Literal[
    "joint",
    "paper",
    "moetuner",
    "heuristic",
    "quick",
    "contiguous",
    "round_robin",
    "random",
    "lpt",
    "eplb",
    "exflow",
]

METHODS: dict[str, tuple[Stage, ...]] = {
    # It has the stages of heuristic, and proofs.
    "joint": (FLOOR, PARTITIONS, SEARCH, PAIR_BOUND, VISIT_BOUND, LOAD_BOUND),
    "paper": (PAPER,),
    "heuristic": (FLOOR, SEARCH),
    "quick": (BALANCE_WINDOWS, FLOOR_OF_WINDOWS),
    "contiguous": (Stage(baselines.contiguous),),
    "round_robin": (Stage(baselines.round_robin),),
    "random": (Stage(baselines.random),),
    "lpt": (Stage(baselines.lpt),),
    "eplb": (Stage(baselines.eplb),),
    "exflow": (Stage(baselines.exflow),),
}
# Methods that can begin from a placement that runs.
METHODS_WITH_INITIAL = ("joint", "heuristic")
# The paper calls its method MoETuner, and so did this package.
ALIASES = {"moetuner": "paper"}
