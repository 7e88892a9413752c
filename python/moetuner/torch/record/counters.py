"""RoutingCounters: statistics of routing, counted where the model runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from moetuner._checks import experts_in, flag, shown, whole_number, window_in
from moetuner.statistics import TABLE_LIMIT, RoutingStatistics
from moetuner.torch.models import moe_layers, same_sizes
from moetuner.torch.record.hooks import Step, StepHooks


class RoutingCounters:
    """Counts load windows, transitions and co-activation on a device, without waiting for it.

    The numbers are those of ``RoutingStatistics.from_trace`` on the same tokens. The device is
    waited for in ``all_reduce`` and ``statistics`` alone.

    Parameters
    ----------
    layers, experts, top_k
        Sizes L, E and K.
    window
        Tokens per window of load; None counts all as one window. Windows add up to memory of
        8*L*E bytes each until ``reset``.
    transitions, coactivation
        Whether to count these pairs.
    device
        Where to count: that of the expert ids.

    Raises
    ------
    ValueError
        If a size is wrong.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        top_k: int,
        *,
        window: int | None = None,
        transitions: bool = True,
        coactivation: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layers = whole_number("layers", layers, highest=1 << 16)
        self.experts = experts_in(experts)
        self.top_k = whole_number("top_k", top_k, highest=self.experts)
        self.window = window_in(window)
        try:
            self.device = torch.device(device)
        except (RuntimeError, TypeError):
            raise ValueError(f"device must be one of torch's, got {shown(device)}") from None
        flag("transitions", transitions)
        flag("coactivation", coactivation)
        self._counts_transitions = transitions
        self._counts_coactivation = coactivation
        self._hooks: StepHooks | None = None
        self._choices = self.experts  # with those of zero computation, which are not given out
        self.reset()

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        *,
        window: int | None = None,
        transitions: bool = True,
        coactivation: bool = True,
        routers: Iterable[str | nn.Module] | None = None,
    ) -> RoutingCounters:
        """Make counters that count every forward pass of a model, without its padding.

        They stop at ``detach``, or at the end of a ``with`` block. The model is never failed by
        them: a pass that cannot be understood is left out, counted in ``dropped``, and the first
        one warned of. A compiled model runs eagerly while it is counted. Zero-computation experts
        do no work and are not counted, so that layers may have different totals.

        Raises
        ------
        ValueError
            If the model has no MoE layers, or they differ in experts or top-k.
        """
        layers = moe_layers(model, routers)
        experts, top_k = same_sizes(layers)
        weights = next(layers[0].router.parameters(), None)
        # Weights that are offloaded have no device; the first pass tells.
        device = torch.device("cpu") if weights is None else weights.device
        counters = cls(
            len(layers),
            experts,
            top_k,
            window=window,
            transitions=transitions,
            coactivation=coactivation,
            device="cpu" if device.type == "meta" else device,
        )
        counters._choices = layers[0].choices
        counters.reset()
        counters._hooks = StepHooks(model, layers, counters._step)
        counters._hooks.attach()
        return counters

    def detach(self) -> None:
        """Stop counting; the counts stay."""
        if self._hooks is not None:
            self._hooks.remove()

    def __enter__(self) -> RoutingCounters:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()

    def reset(self) -> None:
        """Set all counts to zero."""
        pairs = (self._choices, self._choices)
        # Tensors born in inference mode could not be written outside it.
        with torch.inference_mode(False):
            self._load = self._zeros(1, self.layers, self._choices)
            self._transitions = (
                self._zeros(self.layers - 1, *pairs) if self._counts_transitions else None
            )
            self._coactivation = (
                self._zeros(self.layers, *pairs) if self._counts_coactivation else None
            )
            self._tokens = self._zeros()
            self._wrong = torch.zeros((), dtype=torch.bool, device=self.device)
        if self._hooks is not None:
            self._hooks.forget()
        self._most_tokens = 0  # with padding: known without asking the device
        self._ranks = 1

    @property
    def dropped(self) -> int:
        """Forward passes of the model that were left out."""
        return 0 if self._hooks is None else self._hooks.dropped

    def update(self, expert_ids: Tensor, mask: Tensor | None = None) -> None:
        """Count tokens.

        Parameters
        ----------
        expert_ids
            Expert ids [T,L,K], integers; an expert occurs at most once per token and layer. Ids
            out of range are reported by ``statistics``.
        mask
            Tokens that count [T]; None counts all.

        Raises
        ------
        ValueError
            If shape, type or device is wrong.
        """
        sizes = (self.layers, self.top_k)
        if expert_ids.dim() != 3 or expert_ids.shape[1:] != sizes or _is_no_integer(expert_ids):
            raise ValueError(
                f"expert_ids must be integers [tokens, {sizes[0]}, {sizes[1]}], got "
                f"{expert_ids.dtype} {list(expert_ids.shape)}"
            )
        if mask is not None and mask.shape != expert_ids.shape[:1]:
            raise ValueError(f"mask must be [{len(expert_ids)}], got {list(mask.shape)}")
        for name, tensor in (("expert_ids", expert_ids), ("mask", mask)):
            if tensor is not None and tensor.device.type != self.device.type:
                raise ValueError(f"{name} must be on {self.device}, got {tensor.device}")
        if not len(expert_ids):
            return
        # Autocast would round products, and so counts, to bfloat16.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            self._count(expert_ids.long(), None if mask is None else mask != 0)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> RoutingCounters:
        """Return the sum over all ranks of a process group; these counters stay as they are.

        Window w of the sum is what all ranks together did in their window w: ranks in step with one
        another wait for one another. Every rank must call it.

        Raises
        ------
        ValueError
            On every rank, if they differ in sizes, windows or pairs.
        """
        settings = {
            "layers": self.layers,
            "experts": self.experts,
            "rows of the router": self._choices,
            "top_k": self.top_k,
            "window": self.window or 0,
            "transitions": int(self._counts_transitions),
            "coactivation": int(self._counts_coactivation),
        }
        windows = largest_on_ranks(len(self._load), settings, self.device, group)
        total = RoutingCounters(
            self.layers,
            self.experts,
            self.top_k,
            window=self.window,
            transitions=self._counts_transitions,
            coactivation=self._counts_coactivation,
            device=self.device,
        )
        total._choices = self._choices
        total.reset()
        total._load = self._zeros(windows, self.layers, self._choices)
        total._load[: len(self._load)] = self._load
        total._tokens += self._tokens
        total._wrong |= self._wrong
        for ours, theirs in (
            (total._transitions, self._transitions),
            (total._coactivation, self._coactivation),
        ):
            if ours is not None and theirs is not None:
                ours += theirs
        wrong = total._wrong.long()
        for table in (total._load, total._transitions, total._coactivation, total._tokens, wrong):
            if table is not None and table.numel():
                dist.all_reduce(table, dist.ReduceOp.SUM, group)
        total._wrong = wrong > 0
        total._ranks = dist.get_world_size(group) * self._ranks
        return total

    def statistics(self, *, model: str | None = None) -> RoutingStatistics:
        """Copy the counts to the host; waits for the device.

        Parameters
        ----------
        model
            Name of the model, for people.

        Raises
        ------
        ValueError
            If an expert id was out of range, a router gave NaN, or no pass could be counted.
        """
        if self._hooks is not None:
            self._hooks.check()
            if self._hooks.fault is not None and not self._most_tokens:
                raise self._hooks.fault
        if self._wrong.item():
            raise ValueError(f"expert_ids must be from 0 to {self.experts - 1}, some were not")
        real = slice(self.experts)

        def pairs(table: Tensor | None) -> NDArray[Any] | None:
            return None if table is None else table[:, real, real].cpu().numpy()

        return RoutingStatistics(
            self._load[: self._windows(), :, real].cpu().numpy(),
            pairs(self._transitions),
            pairs(self._coactivation),
            window=None if self.window is None else self.window * self._ranks,
            model=model,
        )

    def _windows(self) -> int:
        """Return windows that hold tokens, at least one."""
        if self._ranks > 1 or self.window is None:
            # After a sum the rank with the most windows decides, not the number of tokens.
            held = self._load.sum(dim=(1, 2)).nonzero()
            return int(held.max()) + 1 if held.numel() else 1
        return max(1, -(-int(self._tokens) // self.window))

    def _step(self, step: Step) -> None:
        if step.ids.device != self.device:
            # The model was moved, or its weights did not tell.
            self.device = step.ids.device
            for name in ("_load", "_transitions", "_coactivation", "_tokens", "_wrong"):
                table = getattr(self, name)
                setattr(self, name, None if table is None else table.to(self.device))
        self.update(step.ids, step.batch.keep)

    def _count(self, ids: Tensor, keep: Tensor | None) -> None:
        outside = (ids < 0) | (ids >= self._choices)
        if keep is not None:
            outside &= keep[:, None, None]
        self._wrong |= outside.any()
        ids = ids.clamp(0, self._choices - 1)
        layer = torch.arange(self.layers, device=self.device)[None, :, None]
        place = layer * self._choices + ids
        if self.window is not None:
            self._make_room(len(ids), self.window)
            number = self._number(len(ids), keep).div(self.window, rounding_mode="floor")
            place = place + number[:, None, None] * (self.layers * self._choices)
        self._most_tokens += len(ids)
        self._tokens += len(ids) if keep is None else keep.sum()
        add_ones(self._load, place, keep)
        if self._transitions is not None:
            add_pairs(self._transitions, ids[:, :-1], ids[:, 1:], keep)
        if self._coactivation is not None:
            add_pairs(self._coactivation, ids, ids, keep)
            self._coactivation.diagonal(dim1=1, dim2=2).zero_()

    def _number(self, tokens: int, keep: Tensor | None) -> Tensor:
        """Return the number of every token among those that count [T]."""
        if keep is None:
            return torch.arange(tokens, device=self.device) + self._tokens
        return (keep.cumsum(0) - 1).clamp(min=0) + self._tokens

    def _make_room(self, tokens: int, window: int) -> None:
        """Enlarge the windows of load for as many tokens as there may be."""
        needed = -(-(self._most_tokens + tokens) // window)
        have = len(self._load)
        if needed <= have:
            return
        size = 8 * needed * self.layers * self._choices
        if size > TABLE_LIMIT:
            raise ValueError(
                f"windows must fit {TABLE_LIMIT >> 30} GiB, got {size / 2**30:.0f} GiB for "
                f"{needed} windows: read the statistics and reset the counters"
            )
        with torch.inference_mode(False):
            load = self._zeros(max(needed, 2 * have), self.layers, self._choices)
        load[:have] = self._load
        self._load = load

    def _zeros(self, *sizes: int) -> Tensor:
        return torch.zeros(sizes, dtype=torch.int64, device=self.device)


def _is_no_integer(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool


# The product is faster up to this many experts per top-k. CPU: 5 ns per addition, 0.027 ns per
# multiplication on one core (AVX-512), so E*E * 0.027 < K*K * 5. CUDA: from data sheets (3e9
# atomic additions and 2.5e13 float32 multiplications a second), not measured.
PRODUCT_UP_TO = {"cpu": 13, "cuda": 90}

# Bytes of one-hot matrices, or of places to add to, at a time.
CHUNK_BYTES = 32 << 20


def add_pairs(table: Tensor, first: Tensor, second: Tensor, keep: Tensor | None) -> None:
    """Add pairs of experts to a table, without waiting for the device.

    Parameters
    ----------
    table
        Counts [L,E,E], int64, contiguous; changed in place.
    first, second
        Expert ids [T,L,K], int64; each of ``first`` pairs with each of ``second``.
    keep
        Tokens that count [T]; None counts all.
    """
    tokens, layers, top_k = first.shape
    experts = table.shape[1]
    if not tokens or not layers:
        return
    product = experts <= top_k * PRODUCT_UP_TO.get(table.device.type, 0)
    token_bytes = layers * (8 * experts if product else 16 * top_k * top_k)
    step = max(1, min(CHUNK_BYTES // token_bytes, (1 << 24) - 1))
    add = _add_product if product else _add_scattered
    for at in range(0, tokens, step):
        part = slice(at, at + step)
        left = first[part]
        right = left if second is first else second[part]
        add(table, left, right, None if keep is None else keep[part])


def _add_product(table: Tensor, first: Tensor, second: Tensor, keep: Tensor | None) -> None:
    left = _one_hot(first, table.shape[1], keep)
    right = left if second is first else _one_hot(second, table.shape[1], None)
    table += torch.bmm(left.mT, right).long()


def _one_hot(ids: Tensor, experts: int, keep: Tensor | None) -> Tensor:
    """Return which experts a token visits [L,T,E], as 0 and 1; 0 for tokens that do not count."""
    tokens, layers, top_k = ids.shape
    hot = torch.zeros(layers, tokens, experts, device=ids.device, dtype=torch.float32)
    ones = torch.ones((), device=ids.device, dtype=torch.float32)
    marks = ones if keep is None else keep.to(torch.float32)[None, :, None]
    hot.scatter_add_(2, ids.permute(1, 0, 2), marks.expand(layers, tokens, top_k))
    return hot


def _add_scattered(table: Tensor, first: Tensor, second: Tensor, keep: Tensor | None) -> None:
    layers, experts, _ = table.shape
    row = torch.arange(layers, device=table.device)[None, :, None] * experts + first
    place = row[..., None] * experts + second[:, :, None, :]
    add_ones(table, place, keep)


def add_ones(table: Tensor, place: Tensor, keep: Tensor | None) -> None:
    """Add one at each place [T,..] of a flattened table, for the tokens that count [T]."""
    if keep is None:
        ones = torch.ones((), device=table.device, dtype=table.dtype).expand(place.numel())
    else:
        marks = keep.to(table.dtype).reshape(-1, *[1] * (place.dim() - 1))
        ones = marks.expand(place.shape).reshape(-1)
    table.view(-1).scatter_add_(0, place.reshape(-1), ones)


def largest_on_ranks(
    value: int,
    settings: Mapping[str, int],
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> int:
    """Return the largest value of any rank, once it is clear that all have the same settings.

    Parameters
    ----------
    value
        What may differ.
    settings
        What may not, by name; every rank gives the same names.
    device
        Where the group can exchange tensors.
    group
        The ranks, all of which must call; None is all there are.
    """
    ours = list(settings.values())
    # The largest of a number and of its negative: the range, in one exchange.
    most = torch.tensor([value, *ours, *(-setting for setting in ours)], device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX, group)
    largest, *found = most.tolist()
    high, low = found[: len(ours)], [-setting for setting in found[len(ours) :]]
    differing = [
        f"{name} from {a} to {b}" for name, a, b in zip(settings, low, high, strict=True) if a != b
    ]
    if differing:
        raise ValueError(f"ranks must count alike, got {', '.join(differing)}")
    return int(largest)
