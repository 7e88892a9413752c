"""How long to search: every constant that trades quality for time, by stage.

Each stage names the table of docs/experiments.md that chose its constants, or that they were never
measured. Constants that an algorithm is right or wrong with, whatever the time, stand where it
does; those of the core's own searches stand in the core.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Layers of few slots are searched several times: they have valleys that one descent does not leave.
FEW_SLOTS, RESTARTS = 64, 8


@dataclass(frozen=True)
class Effort:
    """Numbers that a solve without a time limit goes by, which bound its work in trials.

    Parameters
    ----------
    layer_work
        Work of searching all layers, in all turns together: trials times what each looks at, in
        units of about a nanosecond.
    chain_trials
        Trials of a start for each expert of each layer, where traffic of pairs is searched in
        layers that are not wide: the work on wide ones is bounded in the core.
    traffic_caps
        Caps on the imbalance under which traffic alone is searched where time weighs both.
    tangent_iterations
        Iterations, at most, of the bound of pairs that stand for expert sets.
    restarts, single_restarts
        Searches of a layer of few slots, at the most; and where a trial looks at the expert sets of
        single copies. Each is as long as if there were ``RESTARTS`` of them.
    settles_balance
        Whether the search for balance that a search for time begins with takes steps down too.
    """

    layer_work: float
    chain_trials: int
    traffic_caps: tuple[float, ...]
    tangent_iterations: int
    restarts: int
    single_restarts: int
    settles_balance: bool = True


@dataclass(frozen=True)
class Prices:
    """How prices of a move fall: a lower one finds more moves.

    Parameters
    ----------
    number
        Prices at the most.
    first
        The first of them, as a part of what the first move gains.
    ratio
        Each as a part of the one before.
    """

    number: int
    first: float
    ratio: float


# Chosen by "Effort" and, where tangents are meant, by "Bounds of visits": what an effort takes and
# reaches. Under a time limit the time decides.
EFFORTS = {
    "brief": Effort(
        layer_work=7.5e8,
        chain_trials=500,
        traffic_caps=(1.08, math.inf),
        tangent_iterations=24,
        restarts=2,
        single_restarts=1,
        settles_balance=False,
    ),
    "default": Effort(
        layer_work=1.5e9,
        chain_trials=1000,
        traffic_caps=(1.08, math.inf),
        tangent_iterations=24,
        restarts=RESTARTS,
        single_restarts=2,
    ),
    "thorough": Effort(
        layer_work=math.inf,
        chain_trials=2600,
        traffic_caps=(1.02, 1.08, 1.2, 1.5, math.inf),
        tangent_iterations=150,
        restarts=RESTARTS,
        single_restarts=RESTARTS,
    ),
}

# The joint method: the share of a time limit for the search ("The joint method"). It comes first:
# everything else can only add to what it finds.
SEARCH_SHARE = 0.55
# The search of single copies gets this share where there is room for more copies, and that one for
# balance, which copies seldom make worse; if a time limit is at least so many times what judging an
# answer takes (not measured).
SINGLE_SHARE, SINGLE_BALANCE_SHARE, SINGLE_LEAST = 0.4, 0.1, 20
# Share of a time limit for the search for balance that a search for time begins with, and the part
# of the work of one (the share is not measured). On gpt-oss-20b (8 devices, both phases, three
# splits) the search for time is then 0.26 to 0.43 % ahead of the one for balance on what it saw,
# else 0.03 % ahead to 0.08 % behind; it takes a tenth longer.
# In layers of many slots and windows it is the whole search for balance, whose trials take a fifth
# of those for time, and the one for time is a part of its own work ("The default and cheaper
# methods").
BALANCE_SHARE, BALANCE_PART, AFTER_BALANCE_PART = 0.15, 4, 2
# Share of a time limit for the problem of devices that are equally fast, where they are not (not
# measured).
EQUAL_SHARE = 0.4

# Dynamic programming over all partitions, about a nanosecond a step: what a solve, or the check of
# its certificate, may take, and steps of a second on a slow core ("The co-location programme").
PARTITION_STEPS, PARTITION_STEPS_PER_SECOND = 4_000_000_000, 500_000_000

# Layer by layer ("Unseen windows", its "Schedule" and "Time of a whole solve").
# Trials for a slot: of few windows more search brings more, and is cheap; one or two are soon
# level. Of many, the work is bounded: trials times windows, which are looked at LANES at a time.
TRIALS_OF_FEW = {range(1, 4): 1000, range(4, 17): 10_000}
SLOT_WORK, LANES = 60_000, 16
# Trials of a layer: the least, also as work, and the most.
LEAST_TRIALS, LEAST_WORK, MOST_TRIALS = 20_000, 1_600_000, 1_500_000
# How many times as many units a trial of times takes, which follows active experts and ports.
TIME_UNITS = 2
# Trials of a start of the search of traffic: the least and the most.
CHAIN_LEAST, CHAIN_MOST = 200_000, 16_000_000
# Turns of all layers, trials for a slot, and the least of a layer, where neighbouring layers count.
ROUNDS, LINKED_TRIALS, LEAST_LINKED = 3, 600, 60_000
# Placements that are judged on all windows, where a search has seen some that stand for them.
JUDGED = 3
# Slots of all layers up to which a placement is polished by the objective itself, and the best
# placements from which that begins; then the best is changed at random so many times, by so many
# changes, and polished again (not measured).
POLISHED_SLOTS, POLISHED, KICKS, KICKED = 18, 4, 4, 3
# Contents of a layer, and placements, of which all are tried (not measured).
FEW_CONTENTS, FEW_PLACEMENTS = 1000, 2500
# Times that risk and groups are weighed anew, and when something is known of the weights.
REWEIGHTINGS, REWEIGHTINGS_AGAIN = 4, 2
# Share of what is left that searches of traffic alone get where time weighs both (not measured).
TRAFFIC_SHARE = 0.6

# Fewest visits ("Fewest devices per token"): trials of each start on pairs, where they are of wide
# layers (whose trials look at all swaps of an expert), and the share of a time limit that they get.
PAIR_TRIALS, WIDE_SLOTS, WIDE_PAIR_TRIALS, PAIR_SHARE = 200_000, 100, 20_000, 0.3
# Trials for a slot of the exact search; the work that all layers may be at the most, of which 64
# sets of a trial are a unit; and the units of a trial besides its sets.
VISIT_TRIALS, MOST_VISIT_WORK, UNITS_PER_TRIAL = 30_000, 1.5e10, 100
# Where experts have copies: parts that the core cuts a set's tokens into, and how many times as
# much a trial takes.
SET_PARTS, COPY_UNITS = 12, 6
# Searches that share the trials of a layer of at most so many slots; it is left when two agree.
VISIT_FEW_SLOTS, VISIT_RESTARTS = 64, 8

# Bounds of pairs ("The joint method", the bound alone): floating-point work of the iterations that
# are made without a time limit, how many at most, and how many with one.
BOUND_WORK, BOUND_ITERATIONS, BOUND_ITERATIONS_TIMED = 3e9, 150, 10_000
# Seconds for an entry of the tables of pairs, in which no bound can be proven ("Limits").
BOUND_SECONDS = 3e-7

# Bounds of visits ("Bounds of visits"): the share of a time limit for the search before them. Looks
# at all contents of a layer at the most, and contents that are looked at without a time limit.
# Experts of a layer up to which a programme is solved between two looks, in milliseconds; and looks
# times layers times cubed experts, without a time limit.
VISIT_SEARCH_SHARE, PRICE_ROUNDS, PRICE_WORK = 0.5, 60, 3e9
PRICE_EXPERTS, PROGRAMME_WORK = 128, 5e8
# Contents of a device up to which all are tried, as the core has it; seconds for each of them and
# each expert of a token; and in how many times what all of them take prices are good.
PRICE_CONTENTS, PRICE_SECONDS, PRICE_TIMES = 25_000_000, 2.5e-9, 20
# Steps of tangents, trials of the placement that each moves towards, a step's size as a share of
# the range of slopes, and the steps' share of a time limit. Without one: steps times layers times
# squared experts, and the fewest iterations of the bound of pairs that are worth it.
TANGENT_STEPS, TANGENT_TRIALS, TANGENT_STEP, TANGENT_SHARE = 16, 10_000, 0.15, 0.5
TANGENT_WORK, TANGENT_ITERATIONS = 1e6, 20
# Seconds for a pair of experts of a set, to be weighed ("Limits").
TANGENT_SECONDS = 3e-8

# The paper's two stages ("Stage 1 and the paper's method"): nodes of HiGHS's search tree, so that
# no call can run for ever. One core: half a second for a layer of 32 experts on 16 devices, seven
# seconds to place 16 layers on 4 devices.
CLUSTER_NODES, TOTALS_NODES, PLACE_NODES = 200, 200, 20
# Products y[l,c,d] * y[l+1,c',d'] that HiGHS is given at most: with 6480 it took a minute.
MOST_PRODUCTS = 4096

# Few moves ("Budgets that rise", which has each at half and at twice its value): how prices of a
# move fall where layers are mixed, and where they are joined: more prices take longer, and come
# nearer to a budget. The part of the objective that the first move gains at least, for the first
# price: at less, searches end before the budget is spent. Moves beyond twice those of what a search
# found up to which steps go on: they find what searches leave, of few moves above all.
MIXED_PRICES, JOINED_PRICES = Prices(7, 1 / 4, 1 / 3), Prices(24, 4.0, 0.7)
DEAREST, MORE_MOVES = 1e-3, 8
# Share of a time limit for a solve from nothing, where moves are free (not measured).
FRESH_SHARE = 0.9

# The fewest moves that gain enough ("Advice on a real model"): moves up to which steps go at first,
# and how many times as many come next: all steps down take many times as long. The answer does not
# depend on them; at half and at twice their values the time is the same within what it varies.
FIRST_REACH, REACH_TIMES = 64, 4

# Balancing with copies ("Balancing with copies"): pairs of devices that are tried for exchanges.
# The first are what a millisecond allows; devices that differ need the second, because placing the
# heaviest copies first leaves more to mend there.
QUICK, PATIENT = 14, 10_000
# From running slots ("The plugins' policy"): steps of a layer at most, for each device.
ADAPT_STEPS = 8
# What a copy must gain in windows, as a share of all tokens of a device ("The live policy on the
# next window"): where all windows forecast the next one, and where only the last ones do.
LASTING_PRICE, LIVE_PRICE = 2e-3, 5e-5
# Where pairs count: trials for a slot.
LIVE_TRIALS = 35
# The quick search in windows ("Balance in windows within milliseconds"): trials for a slot, the
# least of a layer, and the most for a slot times LANES windows.
BALANCING_TRIALS, LEAST_BALANCING, BALANCING_WORK = 10, 2500, 400
# Where a dispatcher divides tokens over copies: trials for a slot, the most for a slot times
# windows, and the share of a time limit (not measured).
DIVIDED_TRIALS, DIVIDED_WORK, DIVIDED_SHARE = 20, 64, 0.5
# Without hurry: trials for a slot times LANES windows, and the fewest windows for which it is used;
# and those of a start, from which all that counts is searched.
BALANCING_FULL, MANY_WINDOWS, BALANCING_START = 4000, 17, 400
# Where experts survive losses: trials for a slot times LANES windows ("Lost devices").
SPREAD_TRIALS = 50
# Trials for a layer that DeepSeek's own code would balance better.
CATCH_UP = 20_000


def count_trials(slots: int, windows: int | None) -> int:
    """Return the trials of a layer of slots in windows, or (None) where neighbours count."""
    if windows is None:
        return min(max(LINKED_TRIALS * slots, LEAST_LINKED), MOST_TRIALS)
    lanes = -(-windows // LANES) * LANES
    known = (trials for counts, trials in TRIALS_OF_FEW.items() if windows in counts)
    per_slot = next(known, SLOT_WORK // lanes)
    return min(max(per_slot * slots, LEAST_TRIALS, LEAST_WORK // lanes), MOST_TRIALS)


def start_trials(slots: int, windows: int) -> int:
    """Return the trials of a layer of slots in windows where a search begins."""
    return max(BALANCING_START * slots // -(-windows // LANES), LEAST_BALANCING)


def spread_trials(slots: int, windows: int) -> int:
    """Return the trials of a layer of slots in windows whose experts survive losses."""
    return max(SPREAD_TRIALS * slots // -(-windows // LANES), LEAST_BALANCING)


def divided_trials(slots: int, windows: int) -> int:
    """Return the trials of a layer of slots in windows whose tokens are divided over copies."""
    return min(DIVIDED_TRIALS, DIVIDED_WORK // windows) * slots


def quick_trials(slots: int, windows: int) -> int:
    """Return the trials of a layer of slots in windows where milliseconds count."""
    trials = max(BALANCING_TRIALS * slots, LEAST_BALANCING)
    return min(trials, BALANCING_WORK * slots // -(-windows // LANES))
