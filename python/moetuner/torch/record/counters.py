"""RoutingCounters: statistics of routing, counted where the model runs."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetuner._checks import experts_in, flag, shown, whole_number, window_in
from moetuner.statistics import RoutingStatistics
from moetuner.statistics.limits import PAIRS, TABLE_LIMIT
from moetuner.torch.models import moe_layers, same_sizes
from moetuner.torch.record.hooks import Step, StepHooks

# Bytes of the cells' indices that are added to at a time.
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
        self._pairs = {"transitions": transitions, "coactivation": coactivation}
        for name, is_wanted in self._pairs.items():
            flag(name, is_wanted)
        self._hooks: StepHooks | None = None
        self._choices = self.experts  # with zero-computation experts, which statistics() leaves out
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
        """Return counters that count every forward pass of a model, without its padding.

        They stop at ``detach``, or at the end of a ``with`` block. They never make the model fail:
        a pass that cannot be read is left out and counted in ``dropped``; the first one is warned
        of. A compiled model runs eagerly while it is counted. Zero-computation experts do no work
        and are not counted, so that layers may have different totals.

        Raises
        ------
        ValueError
            If the model has no MoE layers, or they differ in experts or top-k.
        """
        layers = moe_layers(model, routers)
        sizes = (len(layers), *same_sizes(layers))
        pairs = {"transitions": transitions, "coactivation": coactivation}
        # Weights that are offloaded have no device; the first pass shows it.
        weights = next(layers[0].router.parameters(), torch.empty(0))
        device = "cpu" if weights.is_meta else weights.device
        counters = cls(*sizes, window=window, device=device, **pairs)
        counters._choices = layers[0].choices
        counters.reset()
        counters._hooks = StepHooks(model, layers, counters._count_step)
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

    @torch.inference_mode(False)  # tensors born in it could not be written outside it
    def reset(self) -> None:
        """Set all counts to zero."""
        rows = self._choices
        sizes: dict[str, tuple[int, ...]] = {"load": (1, self.layers, rows)}
        pairs = [name for name in PAIRS if self._pairs[name]]
        sizes |= {name: (self.layers - PAIRS[name], rows, rows) for name in pairs}
        sizes |= {"tokens": (), "wrong": ()}
        options: dict[str, Any] = {"dtype": torch.int64, "device": self.device}
        self._tables = {name: torch.zeros(size, **options) for name, size in sizes.items()}
        if self._hooks is not None:
            self._hooks.forget()
        self._most_tokens = 0  # with padding: counted without asking the device
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
        sizes, kind = (self.layers, self.top_k), expert_ids.dtype
        is_integer = not (kind.is_floating_point or kind.is_complex or kind == torch.bool)
        if expert_ids.shape[1:] != sizes or not is_integer:
            rule = f"integers [tokens, {sizes[0]}, {sizes[1]}]"
            raise ValueError(f"expert_ids must be {rule}, got {kind} {list(expert_ids.shape)}")
        if mask is not None and mask.shape != expert_ids.shape[:1]:
            raise ValueError(f"mask must be [{len(expert_ids)}], got {list(mask.shape)}")
        for name, tensor in (("expert_ids", expert_ids), ("mask", mask)):
            if tensor is not None and tensor.device.type != self.device.type:
                raise ValueError(f"{name} must be on {self.device}, got {tensor.device}")
        tokens = len(expert_ids)
        is_counted = torch.ones(tokens, device=self.device) if mask is None else mask != 0
        if self.window is not None:
            self._enlarge(-(-(self._most_tokens + tokens) // self.window))
        self._most_tokens += tokens
        step = max(1, CHUNK_BYTES // (16 * self.layers * self.top_k**2))
        with torch.no_grad():
            for first in range(0, tokens, step):
                chunk = slice(first, first + step)
                self._count(expert_ids[chunk].long(), is_counted[chunk].long())

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> RoutingCounters:
        """Return the sum over all ranks of a process group; these counters stay as they are.

        Window w of the sum has the tokens of window w of all ranks, as ranks that wait for one
        another run them at one time. Every rank must call it.

        Raises
        ------
        ValueError
            On every rank, if they differ in sizes, windows or pairs.
        """
        settings: dict[str, Any] = {"layers": self.layers, "experts": self.experts}
        settings |= {"rows of the router": self._choices, "top_k": self.top_k}
        settings |= {"window": self.window, **self._pairs}
        settings_of_ranks: list[Any] = [None] * dist.get_world_size(group)
        # Objects travel by the current device.
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            dist.all_gather_object(settings_of_ranks, (settings, len(self._tables["load"])), group)
        for name in settings:
            values = sorted({sizes[name] or 0 for sizes, _ in settings_of_ranks})
            if len(values) > 1:
                lowest, highest = values[0], values[-1]
                raise ValueError(f"ranks must count alike, got {name} from {lowest} to {highest}")
        total = copy.copy(self)
        total._hooks, total._ranks = None, len(settings_of_ranks) * self._ranks
        with torch.inference_mode(False):
            total._tables = {name: table.clone() for name, table in self._tables.items()}
        total._enlarge(max(windows for _, windows in settings_of_ranks))
        for table in total._tables.values():
            if table.numel():
                dist.all_reduce(table, dist.ReduceOp.SUM, group)
        return total

    def statistics(self, *, model: str | None = None) -> RoutingStatistics:
        """Return the counts, copied to the host; this waits for the device.

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
        tables = {name: table.cpu().numpy() for name, table in self._tables.items()}
        used, experts = np.flatnonzero(tables["load"].any(axis=(1, 2))), slice(self.experts)
        if (table := tables.get("coactivation")) is not None:
            tables["coactivation"] = both = table + table.transpose(0, 2, 1)
            np.einsum("lee->le", both)[:] = 0  # a router may have named an expert twice
        pairs: dict[str, Any] = {
            name: tables[name][:, experts, experts] for name in PAIRS if name in tables
        }
        load = tables["load"][: used.max(initial=0) + 1, :, experts]
        window = None if self.window is None else self.window * self._ranks
        return RoutingStatistics(load, window=window, model=model, **pairs)

    def _count_step(self, step: Step) -> None:
        """Count the tokens of a step."""
        if step.ids.device != self.device:
            # The model was moved, or its weights have no device.
            self.device = step.ids.device
            self._tables = {name: table.to(self.device) for name, table in self._tables.items()}
        self.update(step.ids, step.is_counted)

    def _count(self, ids: Tensor, is_counted: Tensor) -> None:
        """Add tokens [T,L,K] to all tables without waiting; ``is_counted`` [T] is 1 or 0."""
        tables, choices = self._tables, self._choices
        outside = ((ids < 0) | (ids >= choices)).any(2).any(1)
        tables["wrong"] += (outside & (is_counted > 0)).any()
        # Tokens and layers last: they are contiguous, so many are computed together.
        ids = ids.clamp(0, choices - 1).permute(2, 0, 1).contiguous()
        row = torch.arange(self.layers, device=self.device) * choices + ids
        window: Tensor | int = 0
        if self.window is not None:
            number = (is_counted.cumsum(0) - 1).clamp(min=0) + tables["tokens"]
            window = number.div(self.window, rounding_mode="floor")[:, None]
        tables["tokens"] += is_counted.sum()
        cells = {"load": window * (self.layers * choices) + row}
        if "transitions" in tables:
            cells["transitions"] = row[:, None, :, :-1] * choices + ids[:, :, 1:]
        if "coactivation" in tables:
            one, other = torch.triu_indices(self.top_k, self.top_k, 1, device=self.device)
            cells["coactivation"] = row[one] * choices + ids[other]
        for name, cell in cells.items():
            ones = is_counted[:, None].expand(cell.shape)
            tables[name].view(-1).scatter_add_(0, cell.reshape(-1), ones.reshape(-1))

    def _enlarge(self, windows: int) -> None:
        """Enlarge the table of load if it has fewer windows."""
        load = self._tables["load"]
        if windows <= len(load):
            return
        size = 8 * windows * self.layers * self._choices
        if size > TABLE_LIMIT:
            raise ValueError(
                f"windows must fit {TABLE_LIMIT >> 30} GiB, got {size / 2**30:.0f} GiB for "
                f"{windows} windows: read the statistics and reset the counters"
            )
        with torch.inference_mode(False):
            added = load.new_zeros(max(windows - len(load), len(load)), *load.shape[1:])
            self._tables["load"] = torch.cat([load, added])
