"""RoutingCounters: statistics of routing, counted where the model runs."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from moetuner._checks import experts_in, flag, shown, whole_number, window_in
from moetuner.statistics import TABLE_LIMIT, RoutingStatistics
from moetuner.torch.models import moe_layers, same_sizes
from moetuner.torch.record.hooks import Step, StepHooks

# Bytes of places to add to at a time.
CHUNK_BYTES = 32 << 20


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
        self._pairs = {"transitions": transitions, "coactivation": coactivation}
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

    def __exit__(self, *_: object) -> None:
        self.detach()

    def reset(self) -> None:
        """Set all counts to zero."""
        choices = self._choices
        self._tables = {"load": self._zeros(1, self.layers, choices), "tokens": self._zeros()}
        if self._pairs["transitions"]:
            self._tables["transitions"] = self._zeros(self.layers - 1, choices, choices)
        if self._pairs["coactivation"]:
            self._tables["coactivation"] = self._zeros(self.layers, choices, choices)
        self._tables["wrong"] = self._zeros()
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
            "window": self.window,
            **self._pairs,
        }
        said: list[Any] = [None] * dist.get_world_size(group)
        # Objects travel by the current device.
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            dist.all_gather_object(said, (settings, len(self._tables["load"])), group)
        for name in settings:
            values = sorted({of[name] or 0 for of, _ in said})
            if len(values) > 1:
                raise ValueError(
                    f"ranks must count alike, got {name} from {values[0]} to {values[-1]}"
                )
        total = RoutingCounters(
            self.layers,
            self.experts,
            self.top_k,
            window=self.window,
            transitions=self._pairs["transitions"],
            coactivation=self._pairs["coactivation"],
            device=self.device,
        )
        total._choices = self._choices
        total.reset()
        total._enlarge(max(windows for _, windows in said))
        for name, table in total._tables.items():
            own = self._tables[name]
            (table[: len(own)] if table.dim() else table).copy_(own)
            if table.numel():
                dist.all_reduce(table, dist.ReduceOp.SUM, group)
        total._ranks = len(said) * self._ranks
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
        if self._tables["wrong"].item():
            raise ValueError(f"expert_ids must be from 0 to {self.experts - 1}, some were not")
        real = slice(self.experts)
        load = self._tables["load"]
        used = load.sum(dim=(1, 2)).nonzero()
        windows = int(used.max()) + 1 if used.numel() else 1

        def pairs(name: str) -> NDArray[Any] | None:
            table = self._tables.get(name)
            return None if table is None else table[:, real, real].cpu().numpy()

        return RoutingStatistics(
            load[:windows, :, real].cpu().numpy(),
            pairs("transitions"),
            pairs("coactivation"),
            window=None if self.window is None else self.window * self._ranks,
            model=model,
        )

    def _step(self, step: Step) -> None:
        if step.ids.device != self.device:
            # The model was moved, or its weights did not tell.
            self.device = step.ids.device
            self._tables = {name: table.to(self.device) for name, table in self._tables.items()}
        self.update(step.ids, step.keep)

    def _count(self, ids: Tensor, keep: Tensor | None) -> None:
        tables = self._tables
        outside = (ids < 0) | (ids >= self._choices)
        if keep is not None:
            outside &= keep[:, None, None]
        tables["wrong"] += outside.any()
        ids = ids.clamp(0, self._choices - 1)
        layer = torch.arange(self.layers, device=self.device)[None, :, None]
        place = layer * self._choices + ids
        if self.window is not None:
            self._enlarge(-(-(self._most_tokens + len(ids)) // self.window))
            number = self._number(len(ids), keep).div(self.window, rounding_mode="floor")
            place = place + number[:, None, None] * (self.layers * self._choices)
        self._most_tokens += len(ids)
        tables["tokens"] += len(ids) if keep is None else keep.sum()
        add_ones(tables["load"], place, keep)
        if "transitions" in tables:
            add_pairs(tables["transitions"], ids[:, :-1], ids[:, 1:], keep)
        if "coactivation" in tables:
            add_pairs(tables["coactivation"], ids, ids, keep)
            tables["coactivation"].diagonal(dim1=1, dim2=2).zero_()

    def _number(self, tokens: int, keep: Tensor | None) -> Tensor:
        """Return the number of every token among those that count [T]."""
        if keep is None:
            return torch.arange(tokens, device=self.device) + self._tables["tokens"]
        return (keep.cumsum(0) - 1).clamp(min=0) + self._tables["tokens"]

    def _enlarge(self, windows: int) -> None:
        """Enlarge the windows of load, if there are fewer."""
        load = self._tables["load"]
        if windows <= len(load):
            return
        size = 8 * windows * self.layers * self._choices
        if size > TABLE_LIMIT:
            raise ValueError(
                f"windows must fit {TABLE_LIMIT >> 30} GiB, got {size / 2**30:.0f} GiB for "
                f"{windows} windows: read the statistics and reset the counters"
            )
        larger = self._zeros(max(windows, 2 * len(load)), self.layers, self._choices)
        larger[: len(load)] = load
        self._tables["load"] = larger

    def _zeros(self, *sizes: int) -> Tensor:
        # Tensors born in inference mode could not be written outside it.
        with torch.inference_mode(False):
            return torch.zeros(sizes, dtype=torch.int64, device=self.device)


def _is_no_integer(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool


def add_pairs(table: Tensor, first: Tensor, second: Tensor, keep: Tensor | None) -> None:
    """Add pairs of experts to a table [L,E,E], as ``add_ones``.

    Each expert of ``first`` [T,L,K] pairs with each one of ``second`` [T,L,K].
    """
    layers, experts, _ = table.shape
    row = torch.arange(layers, device=table.device)[None, :, None] * experts + first
    size = max(1, CHUNK_BYTES // (16 * max(layers, 1) * first.shape[2] ** 2))
    for at in range(0, len(first), size):
        part = slice(at, at + size)
        place = row[part, ..., None] * experts + second[part, :, None, :]
        add_ones(table, place, None if keep is None else keep[part])


def add_ones(table: Tensor, place: Tensor, keep: Tensor | None) -> None:
    """Add one at each place [T,..] of a flattened table, without waiting for the device.

    ``keep`` [T] marks tokens that count; None counts all.
    """
    ones = torch.ones((), device=table.device, dtype=table.dtype).expand(place.shape)
    if keep is not None:
        ones = keep.to(table.dtype).reshape(-1, *[1] * (place.dim() - 1)).expand(place.shape)
    table.view(-1).scatter_add_(0, place.reshape(-1), ones.reshape(-1))
