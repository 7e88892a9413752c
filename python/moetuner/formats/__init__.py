"""Formats of recordings and maps, one module each: a table of READERS and one of WRITERS.

Nothing here imports an engine, and no engine's file imports these tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from moetuner._checks import ArgumentError, instance, listed, one_of, path_in, window_in
from moetuner.files import is_stream, naming, replacing, size_of
from moetuner.files.opened import Opened, opened
from moetuner.formats import (
    arrow,
    counts,
    csv,
    deepspeed,
    eplb,
    fastdeploy,
    llama_cpp,
    loads,
    megatron,
    memra,
    native,
    sglang,
    sglang_responses,
    tensorrt_llm,
    tokenspeed,
    vllm,
    vllm_ascend,
)
from moetuner.formats.hints import Hints, Traffic
from moetuner.formats.layout import Layout, check_placement
from moetuner.formats.sources import first_file
from moetuner.placement import Placement


class Reader(NamedTuple):
    """A format of recorded routing.

    ``module`` has ``recognises(file)`` and ``read(files, hints)``, which takes all files of one
    recording. Files that are damaged, or do not fit together, raise ValueError with file, place and
    rule in one line; ``recognises`` may, too. ``caution`` is a sentence on what such a recording
    cannot say; it follows INPUT's description.
    """

    title: str
    module: Any
    caution: str = ""


class Writer(NamedTuple):
    """A format of placements.

    ``module`` has ``write_map(placement, path, hints)``, ``recognises_map(file)`` and
    ``read_map(file, hints)``, which returns a ``Layout``. They raise ValueError as readers do; the
    caller names the file, and replaces what was there by what is written.
    ``suffixes`` are endings of file names. ``engine`` is the name in ``ENGINES`` of the engine that
    loads the format, if it is a single one; ``hints`` are the hints that writing needs.
    """

    title: str
    suffixes: tuple[str, ...]
    module: Any
    engine: str | None = None
    hints: tuple[str, ...] = ()


# Files that none of these recognises are moetuner's own, or wrong.
FOREIGN: dict[str, Reader] = {
    "loads": Reader("load tables as CSV, JSON or .npy, or counters of Prometheus", loads),
    "vllm": Reader("routed experts of vLLM, responses or arrays", vllm),
    "tokenspeed": Reader(
        "records of expert load of TokenSpeed's ranks", tokenspeed, counts.CAUTION
    ),
    "sglang": Reader("dumps of SGLang's recorder", sglang),
    "sglang-responses": Reader("routed experts of SGLang, responses", sglang_responses),
    "megatron": Reader("Megatron-Core's router trace, or arrays of its RouterReplay", megatron),
    "tensorrt-llm": Reader("TensorRT-LLM's expert statistics", tensorrt_llm),
    "fastdeploy": Reader(
        "FastDeploy's tokens per expert, answers of its server", fastdeploy, counts.CAUTION
    ),
    "deepspeed": Reader("tokens_per_expert of DeepSpeed's ranks", deepspeed),
    "vllm-ascend": Reader("workloads of vllm-ascend's balancer", vllm_ascend),
    "llama-cpp": Reader(
        "importance matrices of llama.cpp, imatrix.gguf", llama_cpp, llama_cpp.CAUTION
    ),
    "arrow": Reader("Parquet or Arrow", arrow),
    "csv": Reader("CSV with columns layer and expert", csv),
}
OWN = {kind: Reader(f"moetuner's own, as {kind}", native) for kind in native.KINDS}
READERS = FOREIGN | OWN

WRITERS: dict[str, Writer] = {
    "json": Writer("moetuner's own JSON, which its plugins load", (".json",), native),
    "eplb": Writer("the three arrays of DeepSeek's balancer", (".npz",), eplb),
    "sglang": Writer(
        "SGLang's --init-expert-location",
        (".json",),
        sglang,
        "sglang",
        ("hidden_layers", "dense_layers"),
    ),
    "tensorrt-llm": Writer(
        "the YAML of TensorRT-LLM's load balancer",
        (".yaml", ".yml"),
        tensorrt_llm,
        "tensorrt-llm",
        ("dense_layers",),
    ),
    "vllm-ascend": Writer(
        "the JSON of vllm-ascend's expert_map_path", (".json",), vllm_ascend, "vllm-ascend"
    ),
    "memra": Writer("memra's MEMRA_EP_MAP", (".json",), memra, "memra", ("dense_layers",)),
}


def find_reader(source: str | Path | Opened) -> str:
    """Find the name of the reader of a file, or of a folder by its first file."""
    file = opened(source)
    for name, reader in FOREIGN.items():
        if reader.module.recognises(file):
            return name
    first = first_file(file)
    if first.path.is_dir():
        raise ValueError(f"{file.path}: folder must hold the files of a recording, got none")
    for writer in WRITERS.values():
        if first is file and writer.module is not native and writer.module.recognises_map(file):
            raise ValueError(
                f"{file.path}: must be recorded routing, got a placement: {writer.title}"
            )
    return first.kind


def find_readers(sources: Iterable[str | Path | Opened]) -> tuple[str, ...]:
    """Find the names of the readers of files, each once; skip pipes and wrong files."""
    names: list[str] = []
    for file in map(opened, sources):
        if not is_stream(file.path) and file.path.exists():
            with suppress(ValueError):
                names.append(find_reader(file))
    return tuple(dict.fromkeys(names))


def list_cautions(readers: Iterable[str]) -> list[str]:
    """List the cautions of readers, each once."""
    return [*dict.fromkeys(READERS[name].caution for name in readers if READERS[name].caution)]


def open_input(
    path: str | Path | Opened | Iterable[str | Path | Opened],
    *,
    window: int | None = None,
    num_experts: int | None = None,
    top_k: int | None = None,
    hidden_layers: int | None = None,
    dense_layers: Iterable[int] | None = None,
    groups: Mapping[str, str] | None = None,
    reader: str | None = None,
) -> Traffic:
    """Open recorded routing: moetuner's own files, what an engine recorded, or a load table.

    Parameters
    ----------
    path
        File or folder, or several, of one recording or more; content decides what they are.
    window
        Tokens per window. A trace can be counted in any; statistics and load tables have theirs.
    num_experts
        Experts per layer; needed where a trace's file does not say.
    top_k
        Experts per token and layer; needed where files have neither shape nor lists.
    hidden_layers
        Layers of the model, dense ones included; needed where files do not say.
    dense_layers
        Numbers of the hidden layers without experts, where an engine counts them; by default
        content tells.
    groups
        Group of every request by its name, where responses of an engine name their requests.
    reader
        Name in ``READERS``, where content is not to decide.

    Returns
    -------
    RoutingTrace or RoutingStatistics
        A trace is not counted yet.

    Raises
    ------
    ValueError
        If the file is none of these, is damaged, or has another window or other experts.
    OSError
        If it cannot be read.

    Examples
    --------
    >>> import moetuner as mt
    >>> trace = mt.RoutingTrace.from_arrays([[[0, 1]], [[2, 3]]], num_experts=4)
    >>> trace.save("trace.safetensors")
    >>> mt.open_input("trace.safetensors")
    RoutingTrace(tokens=2, layers=1, top_k=2, num_experts=4)
    """
    several = not isinstance(path, str | Path) and isinstance(path, Iterable)
    files = [opened(file) for file in (listed("path", path, "files") if several else [path])]
    if not files:
        raise ValueError("path must name at least one file, got none")
    window_in(window)
    hints = Hints(num_experts, top_k, hidden_layers, _numbers(dense_layers), groups=groups)
    traffic = read_input(files, hints, reader)
    if not traffic.ordered:
        with naming(", ".join(str(file.path) for file in files)):
            hints.check_experts(traffic.num_experts)
            if window not in (None, traffic.window):
                windows = f"{traffic.window} tokens" if traffic.window else "those of its table"
                raise ArgumentError(
                    "window must be left out: the file holds counts in windows already "
                    f"({windows}), got {window}",
                    "window",
                )
    return traffic


def read_input(
    sources: Iterable[str | Path | Opened], hints: Hints, reader: str | None = None
) -> Traffic:
    """Read files and folders; consecutive ones of the same reader are one recording."""
    if reader is not None:
        one_of("reader", reader, READERS)
    files = [opened(source) for source in sources]
    names = [find_reader(file) if reader in (None, *OWN) else reader for file in files]
    for file, name in zip(files, names, strict=True):
        if reader not in (None, name):
            raise ValueError(f"{file.path}: must be {reader} as --from says, got {name}")
    recordings = groupby(zip(names, files, strict=True), key=lambda pair: pair[0])
    return native.join(
        [
            READERS[str(name)].module.read([file for _, file in pairs], hints)
            for name, pairs in recordings
        ],
        [file.path for file in files],
    )


def write_placement(
    placement: Placement,
    to: str,
    path: str | Path,
    *,
    hidden_layers: int | None = None,
    dense_layers: Iterable[int] | None = None,
) -> None:
    """Write a placement as an engine loads it; the file appears whole or not at all.

    Parameters
    ----------
    placement
        The placement to write.
    to
        Name in ``WRITERS``, such as ``sglang``, ``tensorrt-llm`` or ``eplb``.
    path
        The file, with an ending of that format.
    hidden_layers, dense_layers
        Layers of the model, dense ones included, and the numbers of those without experts: for
        formats that count them too.

    Raises
    ------
    ValueError
        If the name has another ending, or the engine could not load the placement: the message says
        which of its constraints is broken, and how to solve so that it is kept.

    Examples
    --------
    >>> import moetuner as mt
    >>> placement = mt.Placement([[[0, 2], [1, 3]]])
    >>> mt.write_placement(placement, "sglang", "experts.json", dense_layers=())
    >>> mt.read_placement("experts.json", devices=2) == placement
    True
    """
    one_of("to", to, WRITERS)
    instance("placement", placement, Placement)
    path, writer = path_in(path), WRITERS[to]
    hints = Hints(hidden_layers=hidden_layers, dense_layers=_numbers(dense_layers))
    if not is_stream(path) and path.suffix not in writer.suffixes:
        with naming(path):
            raise ValueError(
                f"path must end in {' or '.join(writer.suffixes)} for {writer.title}, "
                f"got {path.suffix!r}"
            )
    if writer.engine is not None:
        check_placement(placement, writer.engine)
    with replacing(path) as temporary:
        writer.module.write_map(placement, temporary, hints)


def is_map(source: str | Path | Opened) -> bool:
    """Return whether a file holds a placement, or a map of experts, and no recorded routing.

    False for a damaged file: the error of reading it as INPUT is better.
    """
    file = opened(source)
    if is_stream(file.path) or not file.path.is_file():
        return False
    with suppress(ValueError):
        is_ours = any(writer.module.recognises_map(file) for writer in WRITERS.values())
        return is_ours and not any(reader.module.recognises(file) for reader in FOREIGN.values())
    return False


def find_form(source: str | Path | Opened) -> str:
    """Find the name in ``WRITERS`` of the format of a placement, by its content."""
    file = opened(source)
    size_of(file.path)
    for name, writer in WRITERS.items():
        if writer.module.recognises_map(file):
            return name
    routing = ""
    for reader in FOREIGN.values():
        with suppress(ValueError):
            if reader.module.recognises(file):
                routing = f" but recorded routing, to be given as INPUT ({reader.title})"
    raise ValueError(
        f"{file.path}: not a placement{routing}: its content is none of {', '.join(WRITERS)}"
    )


def read_map(source: str | Path | Opened, hints: Hints, form: str | None = None) -> Layout:
    """Read a map of experts, unchecked, in a format or in that of its content."""
    file = opened(source)
    with naming(file.path):
        layout: Layout = WRITERS[form or find_form(file)].module.read_map(file, hints)
    return layout


def read_placement(
    path: str | Path | Opened,
    *,
    devices: int | None = None,
    num_experts: int | None = None,
    dense_layers: Iterable[int] | None = None,
    form: str | None = None,
) -> Placement:
    """Read a placement of moetuner, or a map of experts that an engine loads.

    Parameters
    ----------
    path
        The file; its content decides what it is.
    devices
        Devices, where the file does not say how many there are.
    num_experts
        Experts per layer; by default one more than the largest that the file names.
    dense_layers
        Hidden layers without experts, whose rows are left out where the format has them.
    form
        Name in ``WRITERS``, where content is not to decide.

    Raises
    ------
    ValueError
        If the file is damaged or none of these, breaks a rule of placements, or leaves something
        open.

    Examples
    --------
    >>> from pathlib import Path
    >>> import moetuner as mt
    >>> _ = Path("map.json").write_text('{"physical_to_logical_map": [[0, 3, 1, 2]]}')
    >>> mt.read_placement("map.json", devices=2).slots.tolist()
    [[[0, 3], [1, 2]]]
    """
    file = opened(path)
    if form is not None:
        one_of("form", form, WRITERS)
    form = form or find_form(file)
    if WRITERS[form].module is native:
        return Placement.load(file)
    hints = Hints(num_experts, devices=devices, dense_layers=_numbers(dense_layers))
    layout = read_map(file, hints, form)
    with naming(file.path):
        return layout.placement(hints)


def _numbers(dense_layers: Iterable[int] | None) -> tuple[int, ...] | None:
    return None if dense_layers is None else tuple(listed("dense_layers", dense_layers, "numbers"))
