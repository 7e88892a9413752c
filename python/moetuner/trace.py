"""RoutingTrace: which experts every token visited, with optional labels of sequences and groups.

A trace comes from arrays or a file. It is read in shards, split by sequence, selected and joined.
Loading a safetensors or .npy file does not read its ids, which stay on disk, also through
``split``, ``select`` and ``concat``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, fields, replace
from functools import reduce
from pathlib import Path
from typing import Any, SupportsIndex, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner import _checks as check
from moetuner.files import jsonl, naming
from moetuner.files.contents import TraceContents, read_trace, write_trace
from moetuner.files.ids import Ids, LeftOut, in_memory, joined, read_ahead
from moetuner.files.opened import Opened, opened
from moetuner.frozen import freeze, html_table
from moetuner.recording import Recording, labelling
from moetuner.recording.population import Population, add_populations

SHARD_BYTES = 64 << 20
# Number of shards beyond which a file is read ahead: the next shard while one is processed.
READ_AHEAD = 2


@dataclass(frozen=True, eq=False, repr=False)
class RoutingTrace(Recording):
    """Routed experts of tokens, in the order in which the tokens were served.

    Make one with ``from_arrays`` or ``load``. A trace may have no tokens, as a selection may be
    empty; its statistics are then one window of zeros.

    Attributes
    ----------
    ids
        Source of the expert ids; read them with ``shards`` or ``expert_ids``.
    num_experts
        Experts per layer, E.
    sequence
        Sequence that each token belongs to [T]; None if not known.
    group
        Group that each token belongs to [T], an index into ``group_names``; None without groups. A
        name may have no token.
    group_names
        Names of the groups, each once.
    model
        Name of the model, for people.
    expert_size
        Hidden and intermediate size of an expert, for predicted times; None if not known.
    population
        What the tokens were drawn from, if ``moetuner.count`` drew them; else None. Selected or
        joined tokens are no such sample any more.

    Examples
    --------
    >>> import moetuner as mt
    >>> import numpy as np
    >>> ids = np.array([[[0, 1]], [[2, 3]], [[0, 2]]])  # three tokens, one layer, top-2
    >>> mt.RoutingTrace.from_arrays(ids, num_experts=4)
    RoutingTrace(tokens=3, layers=1, top_k=2, num_experts=4)
    """

    ordered = True
    unit = "token"
    noun = "a trace"

    ids: Ids
    num_experts: int
    _: KW_ONLY
    sequence: NDArray[np.int32] | None = None
    group: NDArray[np.int16] | None = None
    group_names: tuple[str, ...] = ()
    model: str | None = None
    expert_size: tuple[int, int] | None = None
    population: Population | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.ids, Ids):
            raise TypeError(
                f"ids must be Ids, got {check.shown(self.ids)}: for an array call "
                "RoutingTrace.from_arrays(expert_ids, num_experts=...)"
            )
        tokens = self.ids.shape[0]
        names_given: Any = self.group_names
        if names_given is None and self.group is not None:
            names_given = check.name_groups(self.group)
        names = check.names(names_given)
        vars(self).update(
            num_experts=check.experts_in(self.num_experts),
            group_names=names,
            expert_size=check.expert_size(self.expert_size),
        )
        if self.sequence is not None:
            vars(self)["sequence"] = check.labels("sequence", self.sequence, tokens, np.int32)
        if self.group is not None:
            vars(self)["group"] = check.groups(self.group, tokens, names, np.int16)
        check.text_or_none("model", self.model)
        self._check_population()
        if self.population is not None:
            self.population.check_choices(self.top_k)

    @classmethod
    def from_arrays(
        cls,
        expert_ids: ArrayLike,
        *,
        num_experts: int,
        sequence: ArrayLike | None = None,
        group: ArrayLike | None = None,
        group_names: Iterable[str] | None = None,
        model: str | None = None,
        expert_size: tuple[int, int] | None = None,
    ) -> RoutingTrace:
        """Return a trace of arrays, validated.

        Parameters
        ----------
        expert_ids
            Expert ids [T,L,K] of any integer type, byte order and layout. C-contiguous uint8 and
            uint16 are not copied; other types become uint8 for up to 256 experts, else uint16.
        num_experts
            Experts per layer, E, at most 65536.
        sequence, group, group_names, model, expert_size
            See the attributes. Labels of tokens [T]: sequences are any integers of 32 bits, groups
            integers from 0, whose names are by default their numbers.

        Raises
        ------
        ValueError
            If an argument is wrong; the message names a wrong id's token and layer.
        """
        experts = check.experts_in(num_experts)
        ids = Ids.of(check.array_in("expert_ids", expert_ids), experts)
        labels: dict[str, Any] = {"sequence": sequence, "group": group, "group_names": group_names}
        return cls(ids, experts, model=model, expert_size=expert_size, **labels)

    @classmethod
    def load(cls, path: str | Path | Opened, *, num_experts: int | None = None) -> RoutingTrace:
        """Open a trace: safetensors, ``.npz``, ``.npy`` or JSON lines, recognised by content.

        This checks the header, the size and the labels of a safetensors or ``.npy`` file; its ids
        are validated when ``shards`` reads them.

        Parameters
        ----------
        path
            File to open.
        num_experts
            Experts per layer; needed if the file does not say it (``.npy``), else in place of the
            file's number.

        Raises
        ------
        ValueError
            If the file is cut off, damaged or not a trace.
        OSError
            If it cannot be read.
        """
        file = opened(path)
        if file.kind == "jsonl":
            contents = jsonl.read(file.path, num_experts=num_experts)
        else:
            contents = read_trace(file, num_experts)
        with naming(file.path):
            fields = {**vars(contents), "population": Population.from_tables(contents.population)}
            return cls(**fields)

    def save(self, path: str | Path, *, source: str | None = None) -> None:
        """Write as safetensors, shard by shard; the file appears whole or not at all.

        Parameters
        ----------
        path
            File to write or replace.
        source
            Where the routing was recorded, for people.
        """
        path = check.path_in(path)
        if path.suffix in (".npz", ".npy", ".jsonl", ".json"):
            raise ValueError(f"{path}: a trace is saved as .safetensors, got {path.suffix}")
        check.text_or_none("source", source)
        contents = {field.name: getattr(self, field.name) for field in fields(self)}
        contents["population"] = self.population and self.population.to_tables()
        write_trace(TraceContents(**contents), path, source, SHARD_BYTES)

    @property
    def tokens(self) -> int:
        """Number of tokens, T."""
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        """Number of rows, which are tokens."""
        return self.tokens

    @property
    def layers(self) -> int:
        """Number of MoE layers, L."""
        return self.ids.shape[1]

    @property
    def top_k(self) -> int:
        """Experts per token and layer, K."""
        return self.ids.shape[2]

    @property
    def sequences(self) -> int | None:
        """Number of sequences that have tokens; None where tokens have no sequence."""
        labels = self.sequence
        if labels is None or not len(labels):
            return None if labels is None else 0
        if (labels[:-1] <= labels[1:]).all():  # sorted already, as in most recordings
            return 1 + int(np.count_nonzero(labels[:-1] != labels[1:]))
        return len(np.unique(labels))

    @property
    def left_out(self) -> LeftOut | None:
        """Hidden layers of the model, and the numbers of dense ones; None if none was left out."""
        return self.ids.left_out

    @property
    def is_empty(self) -> bool:
        """Whether there are no tokens."""
        return not self.tokens

    @property
    def choices(self) -> int:
        """How often experts were chosen, in all layers."""
        return self.tokens * self.layers * self.top_k

    def facts(self) -> dict[str, Any]:
        """Return kind and sizes, for JSON."""
        sizes = {"top_k": self.top_k, "tokens": self.tokens, "sequences": self.sequences}
        return {**super().facts(), "kind": "trace", **sizes}

    def rows_in(self, window: int | None) -> int:
        """Return the tokens of a window: ``window``, or all if None."""
        return check.window_in(window) or max(self.tokens, 1)

    @property
    def expert_ids(self) -> check.IdArray:
        """All expert ids [T,L,K], read-only unless they are a copy.

        For a file this is a new memory map at each call, whose ids have not been validated, or a
        copy in memory if the file has another type. Prefer ``shards`` for large traces.
        """
        return self.ids.array()

    def shards(
        self, max_bytes: int = SHARD_BYTES, *, threads: int | None = None
    ) -> Iterator[check.IdArray]:
        """Yield valid runs of tokens [t,L,K] in order, C-contiguous uint8 or uint16, none empty.

        Parameters
        ----------
        max_bytes
            Largest number of bytes to read at once; at least one token is read.
        threads
            Threads that check what is read, all cores by default.

        Raises
        ------
        ValueError
            If an id in the file is wrong, or the file has changed since it was loaded.
        """
        max_bytes = check.whole_number("max_bytes", max_bytes)
        shards = self.ids.shards(max_bytes, check.threads_in(threads))
        is_long = self.tokens * self.layers * self.top_k > READ_AHEAD * max_bytes
        return read_ahead(shards) if is_long and self.ids.fresh else shards

    def split(self, share: float, *, seed: int = 0) -> tuple[RoutingTrace, RoutingTrace]:
        """Split by sequence: neighbouring tokens route similarly, so a split by token would leak.

        Parameters
        ----------
        share
            Share of the sequences, chosen at random, that go to the first part; each part gets at
            least one. Without labels, or with a single sequence, the trace is cut in time, and the
            first part has the first tokens.
        seed
            Random seed.

        Returns
        -------
        tuple
            Both parts, with their tokens in the order of this trace.

        Raises
        ------
        ValueError
            If ``share`` is not between 0 and 1.
        """
        if not (check.is_number(share) and 0 < share < 1):
            raise ValueError(f"share must be between 0 and 1, got {check.shown(share)}")
        seed = check.seed_in(seed)
        sequences = labelling.distinct(self.sequence) if self.sequence is not None else np.empty(0)
        units = sequences.size if sequences.size > 1 else self.tokens
        count = min(max(round(share * units), 1), max(units - 1, 0))
        first = np.arange(self.tokens) < count
        if self.sequence is not None and sequences.size > 1:
            chosen = np.random.default_rng(seed).permutation(sequences)[:count]
            first = labelling.among(self.sequence, chosen)
        return self._keep(first), self._keep(~first)

    def select(
        self,
        *,
        layers: Iterable[SupportsIndex] | None = None,
        groups: Iterable[str | SupportsIndex] | str | None = None,
        sequences: Iterable[SupportsIndex] | None = None,
    ) -> RoutingTrace:
        """Keep some layers, and the tokens of some groups and sequences.

        Parameters
        ----------
        layers
            Numbers of layers, in the order wanted. Those that end up side by side count as
            neighbours.
        groups
            Names or numbers of groups; ``group_names`` stays as it is.
        sequences
            Labels of sequences.

        Raises
        ------
        ValueError
            If the trace has no such layer, group or sequence.
        """
        tokens = None if groups is None else self._mark_groups(groups)
        if sequences is not None:
            is_chosen = self._mark_sequences(sequences)
            tokens = is_chosen if tokens is None else tokens & is_chosen
        if layers is None:
            return self._keep(tokens)
        limits = {"lowest": 0, "highest": self.layers - 1}
        listed = check.listed("layers", layers, "numbers")
        numbers = [check.whole_number("layers", layer, **limits) for layer in listed]
        if not numbers or len(set(numbers)) < len(numbers):
            raise ValueError(f"layers must be at least one and differ, got {numbers}")
        return self._keep(tokens, np.asarray(numbers, dtype=np.intp))

    def _mark_groups(self, groups: Iterable[str | SupportsIndex] | str) -> NDArray[np.bool_]:
        """Return the mask of the tokens [T] of some groups."""
        if self.group is None:
            raise check.ArgumentError("groups: the trace has no groups", "groups")
        names: list[Any] = [groups]
        if not isinstance(groups, str):
            names = check.listed("groups", groups, "names or numbers")
        return labelling.among(self.group, [self._find_group(name) for name in names])

    def _mark_sequences(self, sequences: Iterable[SupportsIndex]) -> NDArray[np.bool_]:
        """Return the mask of the tokens [T] of some sequences."""
        if self.sequence is None:
            raise ValueError("sequences: the trace has no sequences")
        limits = {"lowest": -(1 << 31), "highest": (1 << 31) - 1}
        listed = check.listed("sequences", sequences, "labels")
        labels = [check.whole_number("sequences", label, **limits) for label in listed]
        unknown = np.setdiff1d(np.array(labels, np.int64), labelling.distinct(self.sequence))
        if unknown.size:
            raise ValueError(f"sequences must be labels of the trace, got {unknown[0]}")
        return labelling.among(self.sequence, labels)

    def take(self, rows: ArrayLike) -> RoutingTrace:
        """Return some tokens.

        Parameters
        ----------
        rows
            Mask of the tokens [T], or distinct numbers of tokens, in the order to return. As with
            ``select``, ids stay on disk until they are read.

        Examples
        --------
        >>> import moetuner as mt
        >>> trace = mt.RoutingTrace.from_arrays([[[0]], [[1]], [[2]]], num_experts=3)
        >>> trace.take([2, 0]).expert_ids.ravel().tolist()
        [2, 0]
        """
        wanted = labelling.rows("rows", rows, self.tokens)
        if wanted.dtype == np.bool_:
            return self._keep(wanted)
        if (wanted[:-1] < wanted[1:]).all():
            return self._keep(_make_mask(wanted, self.tokens))
        labels: dict[str, Any] = {
            name: None if values is None else freeze(labelling.at(values, wanted))
            for name, values in (("sequence", self.sequence), ("group", self.group))
        }
        return replace(self, ids=self.ids.reorder(wanted), population=None, **labels)

    def concat(self: RoutingTrace | Iterable[RoutingTrace], *others: RoutingTrace) -> RoutingTrace:
        """Join traces, ``trace.concat(other)`` or ``RoutingTrace.concat([trace, other])``.

        Sequences of different traces are different: if a label occurs in two traces, all sequences
        are numbered anew, from 0. Labels are kept if all traces have them; the model's name and
        sizes if they are the same in all. Groups are the same if they have the same name. Counted
        traces are added.

        Raises
        ------
        ValueError
            If the traces differ in layers, experts or top-k.
        """
        traces: list[Any] = [self, *others]
        if not isinstance(self, RoutingTrace):
            traces = [*check.listed("traces", self, "traces"), *others]
        if not traces:
            raise ValueError("traces to concat must be at least one, got none")
        for trace in traces:
            check.instance("each of the traces", trace, RoutingTrace)
        if len(traces) > 1 and any(trace.population is not None for trace in traces):
            return cast(
                RoutingTrace, reduce(operator.add, traces)
            )  # a sample stands for more than its own tokens
        sizes = {(trace.layers, trace.num_experts, trace.top_k) for trace in traces}
        if len(sizes) > 1:
            raise ValueError(
                f"traces must have the same layers, experts and top_k, got {sorted(sizes)}"
            )
        labels: dict[str, Any] = {}
        labels["group"], labels["group_names"] = labelling.join_groups(traces)
        labels["sequence"] = labelling.join_sequences([trace.sequence for trace in traces])
        for name in ("model", "expert_size"):
            values = {getattr(trace, name) for trace in traces}
            labels[name] = values.pop() if len(values) == 1 else None
        ids = joined(tuple(trace.ids for trace in traces))
        return RoutingTrace(ids, traces[0].num_experts, **labels)

    def __add__(self, other: RoutingTrace) -> RoutingTrace:
        """Add two counted recordings, as ``moetuner.count`` returns them.

        Recordings are in the order of their times, and where they have none one after the other.
        Sequences of different recordings are different, and numbered anew, from 0. A name or a size
        that one side has is that of the sum.

        Raises
        ------
        ValueError
            If one was not counted, or they are of other models, groups or sizes of the sample.
        """
        if not isinstance(other, RoutingTrace):
            return NotImplemented
        rows, labels, sequence = add_populations(self, other)
        ids = Ids((self.ids, other.ids)).reorder(rows).valid_array()
        return RoutingTrace(
            in_memory(ids), self.num_experts, sequence=cast(Any, sequence), **labels
        )

    def __repr__(self) -> str:
        parts = [
            f"{name}={getattr(self, name)}" for name in ("tokens", "layers", "top_k", "num_experts")
        ]
        parts += [f"groups={len(self.group_names)}"] if self.group is not None else []
        parts += [f"model={self.model!r}"] if self.model is not None else []
        return f"RoutingTrace({', '.join(parts)})"

    def _repr_html_(self) -> str:
        groups = None if self.group is None else ", ".join(self.group_names)
        rows: list[tuple[str, Any]] = [
            ("model", self.model),
            *((name, getattr(self, name)) for name in ("tokens", "layers", "top_k", "num_experts")),
            ("sequences", self.sequences),
            ("groups", groups),
        ]
        return html_table(("", "RoutingTrace"), rows)

    def _keep(
        self, tokens: NDArray[np.bool_] | None, layers: NDArray[np.intp] | None = None
    ) -> RoutingTrace:
        """Return the trace of the tokens of a mask [T], and of some layers; None keeps all."""
        labels: dict[str, Any] = {"sequence": self.sequence, "group": self.group}
        if tokens is None and layers is None:
            return self
        if tokens is not None:
            labels = {
                name: None if values is None else freeze(values[tokens])
                for name, values in labels.items()
            }
        return replace(self, ids=self.ids.select(tokens, layers), population=None, **labels)

    def _find_group(self, group: str | SupportsIndex) -> int:
        """Return the number of a group, by its name or number."""
        if isinstance(group, str):
            if group not in self.group_names:
                names = check.shown(list(self.group_names))
                raise check.ArgumentError(
                    f"groups must be of {names}, got {check.shown(group)}", "groups"
                )
            return self.group_names.index(group)
        return check.whole_number("groups", group, lowest=0, highest=len(self.group_names) - 1)


def as_trace(recording: Recording) -> RoutingTrace:
    """Return a recording that is a trace; raise for counts, which have no single tokens."""
    check.instance("trace", recording, RoutingTrace)
    return cast(RoutingTrace, recording)


def _make_mask(numbers: NDArray[np.int64], length: int) -> NDArray[np.bool_]:
    """Return the mask [length] of tokens by their numbers."""
    mask = np.zeros(length, dtype=bool)
    mask[numbers] = True
    return mask
