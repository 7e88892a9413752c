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
        layer_work=3e10,
        chain_trials=2600,
        traffic_caps=(1.02, 1.08, 1.2, 1.5, math.inf),
        tangent_iterations=150,
        restarts=RESTARTS,
        single_restarts=RESTARTS,
    ),
}

# Shares of a time limit ("Constants"). A search that a bound follows gets half of what is left
# ("The joint method"): everything else can only add to what it finds.
SEARCH_SHARE = 0.5
# A search whose answer a longer one starts from gets this share: single copies where there may be
# more, devices of one speed where they have several, traffic alone, pairs, divided tokens.
START_SHARE = 0.4
# A search for balance gets this share: it starts others, which seldom make it worse.
BRIEF_SHARE = 0.1
# Single copies are searched if a limit is so many times what judging an answer takes.
SINGLE_LEAST = 20
# The search for balance that one for time begins with has this part of the work of a search. On
# gpt-oss-20b (8 devices, both phases, three splits) the search for time is then 0.26 to 0.43 %
# ahead of the one for balance on what it saw, else 0.03 % ahead to 0.08 % behind; it takes a tenth
# longer. In layers of many slots and windows the search for balance is a whole one, whose trials
# take a fifth of those for time, and the one for time has this part ("The default and cheaper
# methods").
BALANCE_PART = 2

# Dynamic programming over all partitions, about a nanosecond a step: what a solve, or the check of
# its certificate, may take, and steps of a second on a slow core ("The co-location programme").
PARTITION_STEPS, PARTITION_STEPS_PER_SECOND = 4_000_000_000, 500_000_000

# Layer by layer ("Unseen windows", its "Schedule" and "Time of a whole solve").
# Trials of a search that no effort exceeds: for a slot, times windows, which are looked at LANES at
# a time, and of a layer. They bound tiny layers and searches under a time limit.
SLOT_WORK, LANES, MOST_TRIALS = 160_000, 16, 1_500_000
# How many times as many units a trial of times takes, which follows active experts and ports.
TIME_UNITS = 2
# The fewest trials of a start of the search of traffic.
CHAIN_LEAST = 100_000
# Turns of all layers where neighbouring layers count.
ROUNDS = 3
# Placements that are judged on all windows, where a search has seen some that stand for them.
JUDGED = 3
# Slots of all layers up to which a placement is polished by the objective itself, and the best
# placements from which that begins; then the best is changed at random so many times, by so many
# changes, and polished again (not measured).
POLISHED_SLOTS, POLISHED, KICKS, KICKED = 18, 4, 4, 3
# Contents of a layer, and placements, of which all are tried ("Constants").
FEW_CHOICES = 1000
# Times that risk and groups are weighed anew, and when something is known of the weights.
REWEIGHTINGS, REWEIGHTINGS_AGAIN = 4, 2

# Fewest visits ("Fewest devices per token"): trials of each start on pairs, and where they are of
# wide layers, whose trials look at all swaps of an expert.
PAIR_TRIALS, WIDE_SLOTS, WIDE_PAIR_TRIALS = 200_000, 100, 20_000
# Units of work of a trial besides its sets, of which 64 are a unit.
UNITS_PER_TRIAL = 100
# Where experts have copies: parts that the core cuts a set's tokens into, and how many times as
# much a trial takes.
SET_PARTS, COPY_UNITS = 12, 6

# Bounds of pairs ("The joint method", the bound alone): floating-point work of the iterations that
# are made without a time limit, how many at most, and how many with one.
BOUND_WORK, BOUND_ITERATIONS, BOUND_ITERATIONS_TIMED = 3e9, 150, 10_000
# Seconds for an entry of the tables of pairs, in which no bound can be proven ("Limits").
BOUND_SECONDS = 3e-7

# Bounds of visits ("Bounds of visits"). Looks at all contents of a layer at the most, and contents
# that are looked at without a time limit.
# Experts of a layer up to which a programme is solved between two looks, in milliseconds; and looks
# times layers times cubed experts, without a time limit.
PRICE_ROUNDS, PRICE_WORK = 60, 3e9
PRICE_EXPERTS, PROGRAMME_WORK = 128, 5e8
# Contents of a device up to which all are tried, as the core has it; seconds for each of them and
# each expert of a token; and in how many times what all of them take prices are good.
PRICE_CONTENTS, PRICE_SECONDS, PRICE_TIMES = 25_000_000, 2.5e-9, 20
# Steps of tangents, trials of the placement that each moves towards, a step's size as a share of
# the range of slopes. Without a time limit: steps times layers times squared experts, and the
# fewest iterations of the bound of pairs that are worth it.
TANGENT_STEPS, TANGENT_TRIALS, TANGENT_STEP = 16, 10_000, 0.15
TANGENT_WORK, TANGENT_ITERATIONS = 1e6, 20
# Seconds for a pair of experts of a set, to be weighed ("Limits").
TANGENT_SECONDS = 3e-8

# The paper's two stages ("Stage 1 and the paper's method"): nodes of HiGHS's search tree, so that
# no call can run for ever. One core: half a second for a layer of 32 experts on 16 devices, seven
# seconds to place 16 layers on 4 devices.
STAGE_NODES, PLACE_NODES = 200, 20
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
# Where a dispatcher divides tokens over copies: trials for a slot, and the most for a slot times
# windows (not measured).
LP_SPLIT_TRIALS, LP_SPLIT_WORK = 20, 64
# Without hurry: trials for a slot times LANES windows, and the fewest windows for which it is used;
# and those of a start, from which all that counts is searched.
BALANCING_FULL, MANY_WINDOWS, BALANCING_START = 4000, 17, 400
# Where experts survive losses: trials for a slot times LANES windows ("Lost devices").
SPREAD_TRIALS = 50
# Trials for a layer that DeepSeek's own code would balance better.
CATCH_UP = 20_000


def most_trials(slots: int, windows: int) -> int:
    """Return the most trials of a search of a layer of slots in windows, whatever the effort."""
    lanes = -(-windows // LANES) * LANES
    return min(SLOT_WORK // lanes * slots, MOST_TRIALS)


def start_trials(slots: int, windows: int) -> int:
    """Return the trials of a layer of slots in windows where a search begins."""
    return max(BALANCING_START * slots // -(-windows // LANES), LEAST_BALANCING)


def spread_trials(slots: int, windows: int) -> int:
    """Return the trials of a layer of slots in windows whose experts survive losses."""
    return max(SPREAD_TRIALS * slots // -(-windows // LANES), LEAST_BALANCING)


def lp_split_trials(slots: int, windows: int) -> int:
    """Return the trials of a layer of slots in windows whose tokens are divided over copies."""
    return min(LP_SPLIT_TRIALS, LP_SPLIT_WORK // windows) * slots


def quick_trials(slots: int, windows: int) -> int:
    """Return the trials of a layer of slots in windows where milliseconds count."""
    trials = max(BALANCING_TRIALS * slots, LEAST_BALANCING)
    return min(trials, BALANCING_WORK * slots // -(-windows // LANES))
