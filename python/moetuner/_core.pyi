"""The native core: arrays in, arrays out.

Dimensions: windows W, layers L, experts E, devices D, slots S, tokens T, top-k K.
"""

from collections.abc import Callable
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

__version__: str
__all__ = [
    "Layers",
    "Replay",
    "Rules",
    "Sides",
    "StatisticsCounter",
    "__version__",
    "adapt_slots",
    "balanced_load",
    "bound",
    "bound_visits",
    "busiest_rows",
    "code_tokens",
    "count_recency",
    "estimated_visits",
    "exact_chain",
    "expected_active",
    "expected_apart",
    "expected_load",
    "expected_transitions",
    "expected_visits",
    "find_shortage",
    "forget_pools",
    "instruction_sets",
    "keep_slots",
    "match_best",
    "match_devices",
    "measure_losses",
    "merge_sets",
    "pack",
    "pair_cost",
    "place_clusters",
    "replicate_experts",
    "scan_lines",
    "search",
    "smallest_peaks",
    "spend_budget",
    "validate",
    "verify_bound",
    "verify_visits",
]

_ExpertIds = NDArray[np.uint8] | NDArray[np.uint16]

def code_tokens(expert_ids: _ExpertIds, table: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a number for every token [t]: the sum of what a table [L,E] has for its experts."""

def validate(
    expert_ids: _ExpertIds, num_experts: int, first_token: int = 0, threads: int | None = None
) -> None:
    """Check expert ids [T,L,K]; ``ValueError`` names the first fault, from ``first_token`` on."""

def scan_lines(
    text: bytes, start: int, arrays: list[tuple[str, int]], integers: list[str], texts: list[str]
) -> tuple[int, int, NDArray[np.uint16], NDArray[np.int64], list[str], str | None]:
    """Read JSON lines from byte ``start`` on, up to the first that breaks a rule.

    Returns the end of what was read, the line ends in it, all ids, a row for every line (number of
    its array of ids, three sizes with 1 in front of two, integers or -2**63, numbers of texts or
    -1), the texts, and the rule that the line behind them breaks.
    """

@final
class Rules:
    """What every placement of all layers keeps, in all of the core's searches.

    Experts are kept away from devices where they are ``forbidden`` [L,E,D], and there where they
    are ``pinned`` [L,E,D]. Without ``copies`` no expert gets more of them than are pinned, or one.
    Every expert has ``min_copies``, of devices in two of the failure domains ``domain`` [D] if any.
    ``caps`` [L] are on sums of ``load`` [L,E] of a device, in time of the slowest.
    """

    def __new__(
        cls,
        *,
        copies: bool = True,
        min_copies: int = 1,
        domain: list[int] = ...,
        forbidden: NDArray[np.bool_] | None = None,
        pinned: NDArray[np.bool_] | None = None,
        caps: list[float] | None = None,
        load: NDArray[np.float64] | None = None,
    ) -> Rules: ...

@final
class Layers:
    """Layers with copies of experts, in windows, on devices that may differ.

    Takes load [W,L,E] and the weight of every window [W], the slots of every device [L,D], the node
    of every device [D] and its time per token as a share of the slowest one's [D]. ``norm`` 8
    stands for the largest device load of a window, 0 is that load itself. With the norm, ``noise``
    is the part of an expert's variance among windows that counts as its own, and ``mixed`` how much
    the mean of all windows counts besides them, as a part of what they all count. Without
    ``rules`` every expert is somewhere, and no more is asked. All costs are in weighted tokens.
    """

    def __new__(
        cls,
        load: NDArray[np.float64],
        weight: NDArray[np.float64],
        capacity: NDArray[np.int64],
        node: list[int],
        time: list[float],
        *,
        nearest: bool,
        norm: int,
        noise: float = 0.0,
        mixed: float = 0.0,
        rules: Rules | None = None,
    ) -> Layers: ...
    def price_copies(self, cost: NDArray[np.float64]) -> None:
        """Charge a copy of an expert on a device [L,E,D]."""

    def price_visits(
        self,
        sets: list[tuple[NDArray[np.uint16], NDArray[np.uint64]]],
        *,
        device_cost: float = 1.0,
        node_cost: float = 0.0,
    ) -> None:
        """Charge a token's visits of devices, and of nodes on top.

        Takes every layer's distinct expert sets: ids [N,K], all below E, and their tokens [N].
        """

    def price_time(
        self,
        *,
        base: float,
        expert: float,
        exposed: float,
        start: float,
        row: float,
        counted: bool,
    ) -> None:
        """Charge reading weights, and rows at the busiest port, in tokens; before other prices.

        A device takes the longer of ``base + expert * active experts + exposed * tokens`` and of
        its tokens, and ``start`` to begin. A row at the busiest port costs ``row``: as many as
        visits of expert sets where these are ``counted``, else as tokens.
        """

    @property
    def has_tokens_alone(self) -> bool:
        """Whether a trial looks at tokens of devices alone, not at weights or rows."""

    def price_pairs(
        self, pairs: NDArray[np.uint64], pair_cost: float, *, top_k: list[int] | None = None
    ) -> None:
        """Charge pairs [L,E,E], symmetric with a zero diagonal, that are not on one device.

        With the experts of a token in every layer [L] they tell how many tokens visit a device.
        """

    def price_lp_split(self, load: NDArray[np.float64], weight: NDArray[np.float64]) -> None:
        """Prices windows of load [W,L,E], of weights [W], divided over copies as is best."""

    def price_losses(self, domain: list[int], loss_cost: float) -> None:
        """Charge a power of what a lost domain of devices [D] leaves to another device."""

    def place(
        self,
        start: NDArray[np.int32],
        *,
        trials: int,
        empties: bool = True,
        restarts: int = 1,
        rounds: int = 1,
        quick: bool = False,
        heat: str | None = None,
        chosen: list[int] | None = None,
        links: tuple[NDArray[np.uint64], NDArray[np.float64]] | None = None,
        seed: int = 0,
        time_limit: float | None = None,
        threads: int | None = None,
        alone: bool = False,
        progress: Callable[[float, int | None], None] | None = None,
    ) -> tuple[NDArray[np.int32], bool]:
        """Improve slots [L,D,S] by the best of some searches, and say whether it was interrupted.

        With ``links``, transitions [L-1,E,E] and the cost of one between devices [D,D], layers are
        placed in turns, ``rounds`` times, given their neighbours. Without ``empties`` no
        slot that holds an expert is emptied. Searches begin ``warm``, ``hot`` or ``cool``, where
        they stay near their starts; by default warm and hot in turn. Without links, only the
        ``chosen`` layers change, if some are.
        A ``quick`` search stays near a good start, and ends no worse than that by the slowest
        devices of the windows. ``alone`` does all work in the calling thread, uninterrupted.
        """

    def descend(
        self,
        start: NDArray[np.int32],
        running: NDArray[np.int32],
        *,
        max_moves: int | None = None,
        links: tuple[NDArray[np.uint64], NDArray[np.float64]] | None = None,
        time_limit: float | None = None,
        threads: int | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float64], bool]:
        """Go down from slots [L,D,S] by steps, that which gains most for a copy moved first.

        A copy moves to a device that does not have it in ``running`` [L,D,S]; at most
        ``max_moves`` do. Load above caps comes before all else. Every step writes twice: where in
        the flat slots and which expert [N,2]. After it, so many copies have moved in all, caps are
        exceeded by a part of them (of the worst device, summed over layers), and the cost in
        weighted tokens has changed since the start [N,3]. The last value says whether it was
        interrupted.
        """

    def construct(
        self, *, windows: bool = False, threads: int | None = None, alone: bool = False
    ) -> NDArray[np.int32]:
        """Build slots [L,D,S], balanced on the sum of windows, as by ``replicate_experts``.

        With ``windows`` every window is seen, by its norm, and no answer is behind that of the sum.

        Pins and bans are kept; ``ValueError`` names the layer and an expert for which they leave no
        slot.
        """

    def complete(
        self, start: NDArray[np.int32], *, threads: int | None = None
    ) -> NDArray[np.int32]:
        """Give experts of slots [L,D,S] the copies that rules ask for, and that they lack.

        Each takes an empty slot or, where there is none, that of a copy to spare, whose loads are
        balanced best by that; others move on only where there is neither. A layer stays as it is in
        which an expert finds no slot.
        """

    def nearest(
        self,
        running: NDArray[np.bool_],
        layers: list[int],
        *,
        full: bool,
        threads: int | None = None,
    ) -> NDArray[np.bool_]:
        """Return whether devices are to hold experts of some layers [N,D,E], by the fewest moves.

        Moves are from ``running`` [L,D,E]. An expert gets its pins and as many copies as rules ask
        for. With ``full``, slots that would be empty are filled anyway, which costs no move.
        """

@final
class StatisticsCounter:
    """Counts a trace shard by shard, one token in ``every`` for sets."""

    def __new__(
        cls,
        layers: int,
        num_experts: int,
        top_k: int,
        *,
        window: int | None = None,
        transitions: bool = True,
        coactivation: bool = True,
        sets: bool = False,
        every: int = 1,
    ) -> StatisticsCounter: ...
    def push(
        self, expert_ids: _ExpertIds, threads: int | None = None, *, checked: bool = False
    ) -> None:
        """Count the next tokens [T,L,K], C-contiguous; a faulty shard changes nothing."""

    def finish(
        self, threads: int | None = None
    ) -> tuple[
        int,
        NDArray[np.unsignedinteger[Any]],
        NDArray[np.uint64] | None,
        NDArray[np.uint64] | None,
        list[tuple[NDArray[np.uint16], NDArray[np.uint64]]] | None,
    ]:
        """Tokens, load [W,L,E], transitions [L-1,E,E], coactivation [L,E,E], and sets by layer."""

def merge_sets(
    ids: NDArray[np.uint16], counts: NDArray[np.uint64]
) -> tuple[NDArray[np.uint16], NDArray[np.uint64]]:
    """Add the counts [N] of equal sets of ids [N,K]; distinct ones come in the order of ids."""

# Load [L,E], caps [L], cost [D,D] (symmetric, zero diagonal), slots of a device, transitions
# [L-1,E,E] and coactivation [L,E,E].
_Chain = tuple[
    NDArray[np.uint64],
    NDArray[np.uint64],
    NDArray[np.int64],
    int,
    NDArray[np.uint64] | None,
    NDArray[np.uint64] | None,
]

def search(
    problem: _Chain,
    *,
    seed: int = 0,
    trials: int | None = None,
    time_limit: float | None = None,
    threads: int | None = None,
    progress: Callable[[float, int | None], None] | None = None,
) -> tuple[NDArray[np.int32], int, bool, int]:
    """Search for the placement of least pair cost whose device loads stay under their caps.

    ``trials`` is per start. ``progress`` gets seconds and the best cost. Where no placement under a
    cap is known, the cap is raised to what the most balanced one needs.

    Returns slots [L,D,S], trials made, whether an interrupt ended it early, and the bits that were
    cut from every count so that sums fit (0 unless counts are huge; costs are then off by less than
    that per pair).
    """

# Slots [L,D,S], -1 for an empty one, and the shares of their experts' tokens that they serve.
_Slots = tuple[NDArray[np.int32], NDArray[np.float64]]

def expected_active(
    slots: _Slots, load: NDArray[np.float64], *, threads: int | None = None
) -> NDArray[np.float64]:
    """Return copies of every device that are expected to have a token [W,L,D], of [W,L,E]."""

def balanced_load(
    slots: NDArray[np.int32],
    load: NDArray[np.float64],
    rate: NDArray[np.float64],
    *,
    threads: int | None = None,
) -> NDArray[np.float64]:
    """Return tokens of every device [W,L,D] of experts' [W,L,E], with the slowest done soonest.

    Devices do tokens at ``rate`` [D].
    """

def count_recency(
    expert_ids: _ExpertIds, orders: NDArray[np.uint16], threads: int | None = None
) -> tuple[NDArray[np.uint16], NDArray[np.uint64]]:
    """Count ids of valid tokens [T,L,K] by place in ``orders`` [L,E], experts by their last use.

    Return the orders afterwards, and how often each place was used [L,E].
    """

def expected_load(
    slots: _Slots, load: NDArray[np.float64], *, threads: int | None = None
) -> NDArray[np.float64]:
    """Return tokens of every device [W,L,D], of those of experts [W,L,E]."""

def expected_visits(
    slots: _Slots,
    num_experts: int,
    node_of_device: list[int],
    sets: list[tuple[NDArray[np.uint16], NDArray[np.uint64]]],
    *,
    hashed: bool,
    threads: int | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return tokens of expert sets that visit every device [L,D], and every node [L,N]."""

def estimated_visits(
    slots: _Slots,
    node_of_device: list[int],
    pairs: NDArray[np.uint64],
    top_k: list[int],
    *,
    threads: int | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return visits for each token of load, of devices [L,D] and nodes [L,N], as pairs tell."""

def expected_apart(
    slots: _Slots, pairs: NDArray[np.uint64], *, threads: int | None = None
) -> NDArray[np.float64]:
    """Return pairs of every layer [L] not served by one device, of counts [L,E,E]."""

def expected_transitions(
    slots: _Slots, transitions: NDArray[np.uint64], *, threads: int | None = None
) -> NDArray[np.float64]:
    """Return pairs of neighbouring layers by their devices [L-1,D,D], of counts [L-1,E,E]."""

def busiest_rows(
    visits: NDArray[np.float64],
    share: NDArray[np.float64],
    tier: NDArray[np.uint16],
    tiers: int,
    *,
    threads: int | None = None,
) -> NDArray[np.float64]:
    """Return rows at the busiest port of every tier [W,L,T], of visits [W,L,D].

    Takes the share of every home [L,D,D], home first, and the tier of links [D,D]; 0 is no link.
    """

def pair_cost(
    here: NDArray[np.uint16],
    there: NDArray[np.uint16],
    pairs: NDArray[np.uint64],
    link_cost: NDArray[np.uint64],
    *,
    threads: int | None = None,
) -> int:
    """Return what counts [N,E,E] of pairs cost [D,D], with their experts on devices [N,E] each."""

@final
class Sides:
    """What sides of folds have of windows; where several have the same of one, it is one row."""

    def __new__(cls, tokens: NDArray[np.uint64], sides: list[int]) -> Sides:
        """Take tokens by window and fold [W,F], and the folds of every side, a bit each [S]."""

    def rows(
        self,
    ) -> tuple[NDArray[np.uint32], NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint32]]:
        """Window [R], tokens [R], tokens of the window [R], row of every window and side [W,S]."""

    def add_up(
        self,
        window: NDArray[np.uint32],
        fold: NDArray[np.uint8],
        counts: NDArray[np.unsignedinteger[Any]],
        table: NDArray[np.float64],
        threads: int | None = None,
    ) -> None:
        """Write rows [R,a,b] that have a part of their window, scaled to all of it.

        Counts [C,a,b] are of cells of these windows, rising, and folds [C]. Other rows stay.
        """

@final
class Replay:
    """Replays tokens under a placement, each counted in a row of its own choice."""

    def __new__(
        cls,
        slots: NDArray[np.int32],
        num_experts: int,
        top_k: int,
        node_of_device: list[int],
        *,
        rows: int,
        most_tokens: int,
        split: str = "even",
        visits: bool = True,
        pairs: bool = False,
        stays: bool = False,
        of_slots: bool = False,
    ) -> Replay:
        """Take slots [L,D,S], the node of every device, and how many rows of how many tokens."""

    def push(
        self,
        expert_ids: _ExpertIds,
        rows: NDArray[np.uint32],
        threads: int | None = None,
        *,
        positions: NDArray[np.uint64] | None = None,
        homes: NDArray[np.uint16] | None = None,
        checked: bool = False,
    ) -> None:
        """Count the next tokens [T,L,K], each in a row [T], at positions [T] and homes [T].

        Copies that take turns do so in the order in which tokens are pushed. A faulty shard changes
        nothing.
        """

    def finish(
        self,
    ) -> tuple[
        NDArray[np.unsignedinteger[Any]],
        NDArray[np.unsignedinteger[Any]],
        NDArray[np.unsignedinteger[Any]],
        NDArray[np.unsignedinteger[Any]],
        NDArray[np.uint64],
        NDArray[np.uint64],
    ]:
        """Load [R,L,D], visits [R,L,D], [R,L,N], slots [R,L,P], pairs [L-1,D,D], stays [R].

        Stays are pairs whose experts one device serves both. What was not wanted is empty.
        """

def replicate_experts(
    load: NDArray[np.float64],
    capacity: NDArray[np.int64],
    time: NDArray[np.float64],
    *,
    trials: int = ...,
    rules: Rules | None = ...,
) -> NDArray[np.int32]:
    """Copy the heaviest experts, and place the heaviest copies first on the device done first.

    Takes load [L,E], the slots of every device [L,D] and its time per token as a share of the
    slowest one's [D]. ``trials`` pairs of devices are then looked at for exchanges and other copies
    that lower the time of the slowest; with 0 this is DeepSeek's balancer, less second copies on a
    device. ``rules`` are kept, all but caps.
    Returns slots [L,D,S], -1 for an empty one.
    """

def measure_losses(
    slots: NDArray[np.int32],
    load: NDArray[np.float64],
    domain: list[int],
    time: list[float],
    *,
    threads: int | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Measure single losses of failure domains.

    Takes slots [L,D,S] with -1 for an empty one, load [L,E], the failure domain of every device
    [D], and its time per token as a share of the slowest one's [D]. Copies share
    evenly. Returns the time of the busiest device over the mean of those that are left, 1 where
    nothing is served, and how many experts are lost as a whole [F,L].
    """

def adapt_slots(
    load: NDArray[np.float64],
    slots: NDArray[np.int32],
    time: NDArray[np.float64],
    fresh: NDArray[np.bool_],
    *,
    max_moves: int,
    dead_zone: float,
    deviations: float,
    steps: int,
    trials: int = ...,
    full: bool = ...,
    min_gain: float = ...,
) -> tuple[NDArray[np.int32], list[float], list[float], list[int]]:
    """Relieve the slowest devices of running slots by few copies.

    Takes load [L,E], slots [L,D,S] with -1 for an empty one, the time of every device per token
    as a share of the slowest one's [D], and the layers that no load has shaped [L]: these are
    packed anew if ``max_moves`` suffice for all slots. At most ``max_moves`` copies are brought,
    where they gain most, and each more than ``min_gain`` tokens.
    A layer stays unless the time of its slowest device falls by more than the part ``dead_zone``,
    and by more than chance: counts differ by ``deviations`` of their standard deviations. What
    devices differ counts as far as it is more than that, seen in all layers in which experts have
    slots that are not fresh. ``steps`` is for each
    device of a layer, and ``trials`` as in ``replicate_experts``. Experts without a slot get
    one, and with ``full`` empty slots are filled, unless a device holds all experts already. What
    stays on a device keeps its slot.

    Returns slots [L,D,S], and of every layer the time of the slowest device before (once all slots
    were filled) and after, and the copies brought.
    """

def match_devices(
    packed: NDArray[np.int32], running: NDArray[np.int32], experts: int
) -> NDArray[np.int32]:
    """Give what was packed for a device to one that holds much of it [L,D,S]: fewest copies move.

    All devices are alike; -1 is an empty slot.
    """

def match_best(weight: NDArray[np.int64]) -> NDArray[np.int64]:
    """Match rows with columns [B,N], one to one, for the largest sum of weights [B,N,N].

    Of negative weights none may be below -2**40.
    """

def keep_slots(
    running: NDArray[np.int32], slots: NDArray[np.int32], experts: int
) -> NDArray[np.int32]:
    """Order slots [L,D,S] so that what stays on a device keeps the slot that it has in ``running``.

    What comes takes the first free slots of its device in its order; -1 is an empty slot.
    """

def find_shortage(
    forbidden: NDArray[np.bool_], capacity: list[int]
) -> tuple[int, list[int]] | None:
    """Find experts [E,D] that have fewer slots [D] than they are (Hall, 1935).

    Returns how many they are, and the devices that they may be on; None if all find a slot.
    """

def spend_budget(
    cost: NDArray[np.float64],
    moves: NDArray[np.int64],
    *,
    max_moves: int,
    dead_zone: float,
    deviations: float,
    devices: int,
    min_gain: float = ...,
) -> list[int]:
    """Choose a way for every layer [L]: ways have costs and copies that move [N,L].

    Way 0 is to stay. At most ``max_moves`` copies move, where they gain most and each more than
    ``min_gain``. A layer stays unless it gains more than the part ``dead_zone`` and more than
    ``deviations`` standard deviations of counts as large, times sqrt(2 ln(D)) for D ``devices``.
    """

def pack(
    load: NDArray[np.uint64],
    clusters: int,
    sizes: tuple[int, int],
    *,
    tolerance: float | None = None,
    time_limit: float | None = None,
    threads: int | None = None,
) -> tuple[NDArray[np.uint16], list[tuple[int, int, int, int]], bool]:
    """Split every layer of load [L,E] into clusters of load as even as possible.

    The heaviest expert goes first, to the least loaded cluster; exchanges then lower the largest
    load or, with a ``tolerance``, the sum of deviations from the mean. ``sizes`` are the fewest and
    the most experts of a cluster.

    Returns the cluster [L,E], per layer four whole numbers, and whether it was interrupted. The
    numbers: the heaviest cluster's load, a proven lower bound of it, ``clusters`` times the sum of
    deviations from the mean, and a proven lower bound of that. A layer is searched no further once
    its deviations are within ``tolerance`` times the mean of their bound and its heaviest cluster
    within 0.05 %.
    """

def smallest_peaks(
    load: NDArray[np.uint64],
    devices: int,
    slots: int,
    reached: NDArray[np.uint64],
    *,
    threads: int | None = None,
) -> list[tuple[int, int]]:
    """Enclose the least largest device load that any placement of a layer has.

    Takes load [n,E] and what is known to be reached [n]. Returns per layer what is reached at the
    end and a proven bound; they are equal where the least is known.
    """

def place_clusters(
    traffic: NDArray[np.uint64],
    cost: NDArray[np.uint64],
    *,
    sizes: NDArray[np.uint64] | None = None,
    start: NDArray[np.uint16] | None = None,
    time_limit: float | None = None,
    threads: int | None = None,
) -> tuple[NDArray[np.uint16], str, int, bool]:
    """Place clusters on devices.

    Seeks the least sum over boundaries of the busiest pair's time, then the least total. Takes
    traffic [L-1,D,D] between clusters of neighbouring layers, the cost of a token from device to
    device [D,D], and sizes [L,D] in experts where every device is to hold the same total over all
    layers, as nearly as exchanges reach it; a search may begin at a ``start`` [L,D] as well.
    Returns the device of every cluster [L,D], how it was found, a proven lower bound of the sum,
    and whether it was interrupted.
    """

def exact_chain(
    problem: _Chain, *, work: int, time_limit: float | None = None, threads: int | None = None
) -> tuple[NDArray[np.int32], int, NDArray[np.uint64]] | None:
    """Find the proven optimum by dynamic programming over all partitions of every layer.

    Returns slots [L,D,S], their cost and the caps that were kept [L]:
    where no placement keeps a cap, the least that one does keep. None where links differ other
    than by node, where partitions are too many, where counts are too huge to be exact, where it
    would take more than ``work`` steps of about a nanosecond, or where the time is over.
    """

# Load [L,E], transitions [L-1,E,E], caps [L] and devices, which are interchangeable and have
# ceil(E / devices) slots.
_Instance = tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64], int]

def bound(
    problem: _Instance,
    *,
    iterations: int,
    target: int | None = None,
    gap: float = 0.0,
    time_limit: float | None = None,
    threads: int | None = None,
    progress: Callable[[float, int | None], None] | None = None,
) -> tuple[int, str, int, str, bool, tuple[NDArray[Any], ...]]:
    """Bound the transitions that cross devices from below, in any placement under the caps.

    ``target`` is the best known count, for the ``gap`` to stop at; ``progress`` gets seconds and
    the negative of the bound so far.

    Returns the proven count, which bound it is, iterations, why it ended, whether it was
    interrupted, and the certificate: lambda, columns, multipliers, cuts, choices, contents.
    """

def forget_pools() -> None:
    """Leave the threads of a parent process alone; called in a child that was just forked."""

def instruction_sets() -> list[str]:
    """Return the processor's instruction sets, of those that functions of the core are made for."""

# Each layer's sets (ids [N,K] and counts [N]), load [L,E], caps [L], slots of every device [L,D].
_Visited = tuple[
    list[tuple[NDArray[np.uint16], NDArray[np.uint64]]],
    NDArray[np.uint64],
    NDArray[np.uint64],
    NDArray[np.uintp],
]

def bound_visits(
    problem: _Visited,
    start: NDArray[np.uint16],
    *,
    rounds: int,
    work: float,
    gap: float = 0.0,
    time_limit: float | None = None,
    threads: int | None = None,
    progress: Callable[[float, int | None], None] | None = None,
) -> tuple[NDArray[np.uint64], NDArray[np.float64], bool] | None:
    """Bound the devices that tokens visit from below, by prices of experts.

    Takes a placement to begin from [L,E]. Returns proven visits [L], what proves them (prices
    [L*E]), and whether it was interrupted; None where contents of a device are too many to look at.
    ``progress`` takes seconds and the negated visits.
    """

def verify_bound(
    problem: _Instance, certificate: tuple[NDArray[Any], ...], *, threads: int | None = None
) -> int:
    """Recompute a bound from a certificate's arrays alone; whatever they hold, it is proven."""

def verify_visits(
    problem: _Visited, prices: NDArray[np.float64], *, threads: int | None = None
) -> NDArray[np.uint64]:
    """Recompute the visits [L] that prices [L*E] prove; whatever these are, it is proven."""
