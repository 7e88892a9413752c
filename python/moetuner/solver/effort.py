"""How long to search: every constant that trades quality for time, by stage.

A comment says what the constant trades, and names in quotes the section of docs/experiments.md that
measured it; "Constants" there has them at half and at twice their values, and
``python bench/constants.py --names NAME`` measures one. Constants on which an algorithm's
correctness depends stand beside the algorithm, those of the core's searches in the core.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Slots of a layer up to which it is searched several times: small layers have local optima that one
# descent does not leave ("Schedule", "Constants").
FEW_SLOTS = 64
# Slots of a layer up to which steps down follow a search where copies cost: more take longer.
STEP_SLOTS = 128
# Searches of a layer of few slots: more take longer (the same sections).
RESTARTS = 8


@dataclass(frozen=True)
class Effort:
    """Bounds on the work of a solve without a time limit, in trials.

    Parameters
    ----------
    layer_work
        Work of searching all layers, in all turns together: trials times the work of each, in units
        of about a nanosecond.
    chain_trials
        Trials of a start for each expert of each layer, where traffic of pairs is searched. The
        core bounds the work on wide layers itself.
    traffic_caps
        Caps on the imbalance, one search of traffic alone under each, where time weighs both.
    tangent_iterations
        Most iterations of the bound of pairs that stand for expert sets.
    restarts, single_restarts
        Most searches of a layer of few slots; the second where a trial counts the expert sets of
        single copies. Each search is as long as if there were ``RESTARTS`` of them.
    copy_searches
        How many of ``COPY_SEARCHES`` are made.
    settles_balance
        True if the search for balance, with which a search for time begins, ends with steps down.
    balancing
        Trials for a slot times LANES windows of the whole search in windows.
    """

    layer_work: float
    chain_trials: int
    traffic_caps: tuple[float, ...]
    tangent_iterations: int
    restarts: int
    single_restarts: int
    copy_searches: int = 4
    settles_balance: bool = True
    balancing: int = 4000


@dataclass(frozen=True)
class Prices:
    """Falling prices of a move: a search at a lower price moves more experts.

    Parameters
    ----------
    number
        Most prices.
    first
        The first price, as a part of the gain of the first move.
    ratio
        Each price, as a part of the one before.
    """

    number: int
    first: float
    ratio: float


@dataclass(frozen=True)
class CopySearch:
    """One of the searches of layers whose copies cost.

    Parameters
    ----------
    heat
        The temperatures that it begins at.
    from_full
        True if it begins with full slots, else with the best placement.
    of_slowest
        True if it minimises the slowest devices themselves, else the norm that stands for them.
    """

    heat: str
    from_full: bool = False
    of_slowest: bool = False


# Each level of effort trades the objective for time ("Effort" and "Constants"; "Schedule" for
# restarts, "Bounds of visits" for tangents). Under a time limit the time decides.
EFFORTS = {
    "brief": Effort(
        layer_work=7.5e8,
        chain_trials=500,
        traffic_caps=(1.08, math.inf),
        tangent_iterations=24,
        restarts=2,
        single_restarts=1,
        copy_searches=3,
        settles_balance=False,
        balancing=1000,
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

# Shares of a time limit.
# The share of the time left for a search that something follows: a bound, or a longer search that
# starts from it (single copies where there may be several, equal speeds where devices differ,
# traffic alone, pairs, split lp, a solve from scratch where moves are free). More improves the
# placement, less the bound ("The joint method", "Constants").
SEARCH_SHARE = 0.5
# Share of a search for balance that gives another search its start: a short one is nearly as good
# ("Constants").
BRIEF_SHARE = 0.1
# Least time limit for a search of single copies, in times of judging one placement: below that its
# answer would hardly be judged ("Constants").
SINGLE_LEAST = 20
# Part, one over this, of the work of a search: for balance, with which a search for time begins.
# On gpt-oss-20b (8 devices, both phases, three splits) the search for time is then 0.26 to 0.43 %
# ahead of the one for balance on what it saw, else 0.03 % ahead to 0.08 % behind; it takes a tenth
# longer. In layers of many slots and windows it is the other way round: the search for balance is
# a whole one, whose trials take a fifth of those for time, and the search for time has this part
# ("The default and cheaper methods", "Constants").
BALANCE_PART = 2
# The same of the whole search in large layers where expert sets are known, and the search for time
# has less than this part of its trials ("The default and cheaper methods").
SETS_BALANCE_PART = 4

# Parts of the work of a search where all slots must be full: with which full slots are searched,
# and once more from the answer that may leave some empty ("Full slots").
FULL_PART = 2
FILLED_PART = 32

# The searches of layers whose copies cost, one after the other; they share the work of one.
COPY_SEARCHES = (
    CopySearch("hot", from_full=True),
    CopySearch("warm", from_full=True),
    CopySearch("warm"),
    CopySearch("cool", of_slowest=True),
)
# Part that the first two of them must gain over the answer for fewer slots, for the others to
# follow.
COPY_GAIN = 3e-4

# Part that the last slot of every device must gain, for both phases' regrets to be balanced.
WALK_GAIN = 5e-3

# Most steps of dynamic programming over all partitions, in a solve or in the check of its
# certificate; a step takes about a nanosecond. More prove the optimum of larger layers ("The
# co-location programme").
PARTITION_STEPS = 4_000_000_000
# Steps of a second on a slow core (the same section).
PARTITION_STEPS_PER_SECOND = 500_000_000

# Search layer by layer.
# Windows that the core computes at a time.
LANES = 16
# Most trials of a search for a slot, whatever the effort, times windows, rounded up to whole LANES.
# It ends searches of tiny layers, and those under a time limit, where more trials hardly help
# ("Time of a whole solve").
SLOT_WORK = 160_000
# Work of a trial for time, in trials for balance: it counts active experts and ports, too. A larger
# number means fewer trials ("The default and cheaper methods", "Constants").
TIME_UNITS = 2
# Least trials of each start of the search of traffic: more take longer ("Constants").
CHAIN_LEAST = 100_000
# Rounds over all layers where neighbouring layers count: more rounds of fewer trials each let
# layers follow each other ("Constants").
ROUNDS = 3
# Slots of all layers up to which a placement is polished by the objective itself: more take longer,
# and find better answers to small problems ("Constants").
POLISHED_SLOTS = 18
# Best placements that polishing starts from, with the same trade.
POLISHED = 4
# Most contents of a layer, and most placements, that are enumerated: more take longer, and make
# the answer to larger problems exact ("Constants").
FEW_CHOICES = 1000
# Times that a search weighs windows anew for a risk or groups. Each has its part of the trials
# ("Constants"; "Risk, the worst group, and budgets").
REWEIGHTINGS = 4

# Fewest visits.
# Trials of each start on pairs. The search on expert sets follows, and more trials of pairs give it
# a better start ("Fewest devices per token", "Constants", "The joint method").
PAIR_TRIALS = 200_000
# Slots of a layer from which it is wide: a trial of pairs then tries all swaps of an expert.
WIDE_SLOTS = 100
# Trials of each start on pairs in wide layers.
WIDE_PAIR_TRIALS = 20_000
# Work of a trial besides its expert sets, where 64 sets are a unit: a larger number means fewer
# trials ("Constants").
UNITS_PER_TRIAL = 100
# Searches of a layer of few slots, which share its trials: fewer are longer, and end better
# ("Fewest devices per token").
VISIT_SEARCHES = 2
# Trials for the work of one: most are refused before all of their sets are counted (the same).
VISIT_TRIALS = 2
# Parts that the core cuts the tokens of a set into, where experts have copies: a larger number
# means fewer trials ("Constants").
SET_PARTS = 12
# Work of a trial where experts have copies, in trials of single copies: a larger number means fewer
# trials ("Constants"; no case changed).
COPY_UNITS = 3

# Bounds of pairs.
# Floating-point work of the iterations without a time limit: more closes the gap further ("The
# joint method", "Constants").
BOUND_WORK = 3e9
# Most iterations without a time limit, and with one (the same sections).
BOUND_ITERATIONS, BOUND_ITERATIONS_TIMED = 150, 10_000
# Seconds for an entry of the tables of pairs: the least time limit that a bound needs ("Limits").
BOUND_SECONDS = 3e-7

# Bounds of visits: more of each closes the gap further and takes longer ("Bounds of visits",
# "Constants").
# Most rounds over all contents of a device.
PRICE_ROUNDS = 60
# Most contents of all rounds together, without a time limit.
PRICE_WORK = 3e9
# Experts of a layer up to which a linear programme is solved between two rounds, in milliseconds.
PRICE_EXPERTS = 128
# Contents of a device up to which all are tried, as the core has it.
PRICE_CONTENTS = 25_000_000
# Seconds for each of these contents and each expert of a token.
PRICE_SECONDS = 2.5e-9
# Factor from the least seconds of the bound to the seconds after which prices are good.
PRICE_TIMES = 20
# Most steps of tangents.
TANGENT_STEPS = 16
# Trials of the placement towards which a step goes.
TANGENT_TRIALS = 10_000
# Size of a step, as a share of the range of slopes.
TANGENT_STEP = 0.15
# Most steps times layers times squared experts, without a time limit.
TANGENT_WORK = 1e6
# Least iterations of the bound of pairs that prove more than none, without a time limit.
TANGENT_ITERATIONS = 20
# Gap of the first tangents, by sums of rows and columns, beyond which a solve without a time limit
# states this bound: steps and iterations would close less than half of it ("Bounds of visits").
HOPELESS = 0.3
# Seconds to weigh a pair of experts of a set: part of the least time limit ("Limits").
TANGENT_SECONDS = 3e-8

# The paper's two stages.
# Most nodes of HiGHS's search tree, for clusters and for their devices, so that every call ends.
# One core: half a second for a layer of 32 experts on 16 devices, seven seconds to place 16 layers
# on 4 devices ("Stage 1 and the paper's method").
STAGE_NODES, PLACE_NODES = 200, 20
# Most products y[l,c,d] * y[l+1,c',d'] that HiGHS is given: with 6480 it took a minute (the same).
MOST_PRODUCTS = 4096

# Few moves.
# Falling prices of a move, where layers are mixed and where they are joined: more prices take
# longer, and come nearer to a budget ("Budgets that rise", at half and at twice, too).
MIXED_PRICES, JOINED_PRICES = Prices(7, 1 / 4, 1 / 3), Prices(24, 4.0, 0.7)
# Least gain of the first move that the first price is made of, as a part of the objective: at less,
# searches end before the budget is spent (the same).
DEAREST = 1e-3
# Moves beyond twice those of a search's answer up to which steps go on from it: they find what
# searches miss, with few moves above all (the same).
MORE_MOVES = 8

# The fewest moves that gain enough. The answer does not depend on these two. At half and at twice
# their values the time is the same within its noise ("Advice on a real model").
# Moves up to which steps go at first: all steps would take three to six times as long.
FIRST_REACH = 64
# Factor from these to the moves up to which steps go next.
REACH_TIMES = 4

# Balancing with copies.
# Pairs of devices that are tried for exchanges, in the millisecond that this number allows
# ("Balancing with copies", which has 8 beside 14).
QUICK = 14
# The same where devices differ: placing the heaviest copies first leaves more to mend there.
PATIENT = 10_000
# From running slots: most steps of a layer, for each device; more take longer, and gain where loads
# have drifted far ("The plugins' policy", "Constants").
ADAPT_STEPS = 8
# Least gain of a moved copy in windows, as a share of all tokens of a device, where all windows
# forecast the next one, and where only the last ones do: less moves more copies ("The live policy
# on the next window").
LASTING_PRICE, LIVE_PRICE = 2e-3, 5e-5
# Trials for a slot where pairs count: more take longer in every live decision (the same section;
# the case of "Constants" did not change).
LIVE_TRIALS = 35
# The quick search in windows. More trials gain about as their logarithm ("Balance in windows within
# milliseconds", "Constants").
# Trials for a slot.
BALANCING_TRIALS = 10
# Least trials of a layer.
LEAST_BALANCING = 2500
# Most trials for a slot times LANES windows.
BALANCING_WORK = 400
# Split lp: trials for a slot times windows ("Constants": the case did not change).
LP_SPLIT_WORK = 32
# Fewest windows for which the whole search is used: more trials fit the windows seen, and not the
# unseen ones ("Constants", "Balance in windows within milliseconds").
MANY_WINDOWS = 17
# Fewest trials of a slot with which layers that were balanced are annealed ("Many large layers").
LEAST_TRIALS = 100
# Fewest trials of a slot with which a small layer is searched several times by its slowest devices:
# it is there that this ends at the optimum ("Tiny layers").
MANY_TRIALS = 40_000
# Of at least so many layers, this number is searched first, and the others only if one of these
# gains ("The default and cheaper methods").
MANY_LAYERS, FIRST_LAYERS = 32, 8
# Searches that share the work of one where the slowest devices are searched after the norm; the
# fewest windows, and most experts of a layer, where that helps on unseen windows, too; in large
# layers the slots of a device, in numbers of devices ("The slowest devices themselves").
SLOWEST_PARTS = 2
SLOWEST_WINDOWS = 16
SLOWEST_EXPERTS = 8
SLOWEST_SLOTS = 2
# Trials of a start, from which all terms are searched, for a slot times LANES windows.
BALANCING_START = 400
# Where experts survive losses: trials for a slot times LANES windows ("Lost devices").
SPREAD_TRIALS = 50
# Trials for a layer that DeepSeek's own code balances better: more match it in more layers
# ("Balancing with copies"; the cases of "Constants" did not change).
CATCH_UP = 20_000


def count_batches(windows: int) -> int:
    """Return the number of batches of LANES windows that the core computes."""
    return -(-windows // LANES)


def most_trials(slots: int, windows: int) -> int:
    """Return the most trials of a search of a layer, whatever the effort."""
    return SLOT_WORK // (count_batches(windows) * LANES) * slots


def start_trials(slots: int, windows: int, of_slot: int) -> int:
    """Return the trials that give a search of a layer its start, by those of a slot."""
    return max(of_slot * slots // count_batches(windows), LEAST_BALANCING)


def lp_split_trials(slots: int, windows: int) -> int:
    """Return the trials of a layer whose tokens a dispatcher divides by split lp."""
    return max(LP_SPLIT_WORK // windows, 1) * slots


def quick_trials(slots: int, windows: int) -> int:
    """Return the trials of the quick search of a layer in windows, which takes milliseconds."""
    trials = max(BALANCING_TRIALS * slots, LEAST_BALANCING)
    return min(trials, BALANCING_WORK * slots // count_batches(windows))
