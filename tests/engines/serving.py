"""Run an engine once in a process of its own and hand its answer to the tests.

An engine takes half a minute to start, so each run serves many assertions. Its files stay below
`.engines/runs/` until the next run of that name; the golden files of the readers are made of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pages
import pytest
import tiny_models

import moetuner as mt
from moetuner.torch import permute_state_dict

HERE = Path(__file__).parent
BELOW = HERE.parents[1] / ".engines"
TOKENS = 12
# DeepSpeed looks for ninja, which is in this environment.
PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
LIMIT = 900  # seconds for one run; half a minute on a quiet machine

VLLM = {
    "PYTHONPATH": f"{HERE / 'vllm_on_cpu'}:{HERE}",
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_CPU_CI_ENV": "1",  # no warm-up
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
SGLANG = {
    "PYTHONPATH": f"{HERE / 'sglang_on_cpu'}:{HERE}",
    "SGLANG_USE_CPU_ENGINE": "1",
    # Or it builds a communicator of NCCL, which wants a GPU.
    "SGLANG_NCCL_SO_PATH": "/nonexistent/libnccl.so",
}
DEFAULTS = {"vllm": VLLM, "sglang": SGLANG}
RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
TWO: dict[str, dict[str, Any]] = {
    "vllm": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    "sglang": {"tp_size": 2, "ep_size": 2},
}
EXPERTS, COPIES, SLOTS = 16, 2, 9  # 16 experts and 2 copies on 2 ranks with 9 slots


@dataclass(frozen=True)
class Served:
    """What an engine answered: tokens by prompt, routed experts if returned, its files and log."""

    folder: Path
    log: str
    prompts: list[list[int]]
    tokens: list[list[int]]
    routed: list[np.ndarray]

    @property
    def sequences(self) -> list[list[int]]:
        """Prompts with what was generated, without the last token: it was never routed."""
        return [
            prompt + tokens[:-1] for prompt, tokens in zip(self.prompts, self.tokens, strict=True)
        ]

    def maps(self) -> list[list[list[list[int]]]]:
        """Return the maps [L,P] that came into force, by rank."""
        return [
            [json.loads(line)[1] for line in file.read_text().splitlines()]
            for file in sorted((self.folder / "maps").glob("rank*.jsonl"))
        ]

    def common_maps(self) -> list[list[list[int]]]:
        """Return the maps that came into force, which must be the same on both ranks."""
        first, second = self.maps()
        assert first == second
        return first

    def check_same(self, before: Served) -> None:
        """Assert that tokens and experts are what they were before."""
        assert self.tokens == before.tokens
        for ours, theirs in zip(self.routed, before.routed, strict=True):
            assert same_routing(ours, theirs)

    def check_greedy(self, checkpoint: Path) -> None:
        """Assert that the tokens are the likeliest ones, as transformers computes them."""
        assert self.tokens == [
            tiny_models.greedy(checkpoint, prompt, len(new))
            for prompt, new in zip(self.prompts, self.tokens, strict=True)
        ]


def model(name: str) -> Path:
    """Return the folder of a tiny model, made if it is not there."""
    return tiny_models.build(name, BELOW / "models")


def folder_of(name: str) -> Path:
    """Return an empty folder for the run ``name``."""
    folder = BELOW / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def program(
    name: str, arguments: list[str], environment: dict[str, str], folder: Path, *, ends: bool = True
) -> str:
    """Run a program of this folder; return what it wrote, or fail with its end.

    Without ``ends`` it has to end with an error; it fails here if it goes on or ends well.
    """
    log = folder / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, HERE / name, *map(str, arguments)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PATH": PATH, **environment},
            start_new_session=True,
        )
    try:
        status = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    text = log.read_text(errors="replace")
    if status is None or (status == 0) != ends:
        pytest.fail(f"{name} ended with status {status}; the end of {log}:\n{text[-4000:]}")
    return text


def specify(folder: Path, checkpoint: Path, arguments: dict[str, Any], **more: Any) -> Path:
    """Write what an engine is to serve."""
    prompts = {"prompts": tiny_models.prompts(), "tokens": TOKENS}
    content = {"model": str(checkpoint), "arguments": arguments, **prompts, **more}
    path = folder / "specification.json"
    path.write_text(json.dumps(content))
    return path


def acted(
    engine: str,
    name: str,
    checkpoint: Path,
    arguments: dict[str, Any],
    variables: dict[str, str],
    actions: list[list[Any]],
) -> tuple[list[Any], str]:
    """Do actions in turn in an engine on two ranks; return what came of each, and the log."""
    folder = BELOW / "runs" / name
    if not (os.environ.get("ENGINES_REUSE") == "1" and (folder / "actions.json").exists()):
        folder = folder_of(name)
        options = {**TWO[engine], **arguments}
        path = specify(folder, checkpoint, options, actions=actions)
        environment = {**DEFAULTS[engine], **RANKS, "ENGINES_MAPS": str(folder / "maps")}
        program(f"{engine}_serve.py", [path, folder], {**environment, **variables}, folder)
    log = (folder / "log.txt").read_text(errors="replace")
    return json.loads((folder / "actions.json").read_text()), log


def kill_a_rank(
    engine: str, name: str, checkpoint: Path, arguments: dict[str, Any], options: dict[str, str]
) -> str:
    """Serve on two ranks while one is killed, which has to end the engine; return its log."""
    folder = folder_of(name)
    specification = specify(folder, checkpoint, {**TWO[engine], **arguments})
    environment = {**DEFAULTS[engine], **RANKS, **options, "ENGINES_MAPS": str(folder / "maps")}
    return program(f"{engine}_serve.py", [specification, folder], environment, folder, ends=False)


def any_placement(name: str, layers: int, experts: int, slots: int, turn: int = 0) -> Path:
    """Write a placement on two ranks unlike any engine's own: experts in falling order, turned."""
    row = (np.arange(2 * slots)[::-1] + turn) % experts
    path = BELOW / "runs" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    mt.Placement([row.reshape(2, slots)] * layers, num_experts=experts).save(path)
    return path


def serve(
    engine: str,
    name: str,
    checkpoint: Path,
    arguments: dict[str, Any],
    environment: dict[str, str] | None = None,
) -> Served:
    """Serve the prompts with ``engine`` ("vllm" or "sglang") and return what came.

    With ``ENGINES_REUSE=1`` the answers of an earlier run of this name are taken, if it had any.
    """
    folder = BELOW / "runs" / name
    if os.environ.get("ENGINES_REUSE") == "1" and (folder / "tokens.json").exists():
        log = (folder / "log.txt").read_text(errors="replace")
    else:
        specification = specify(folder_of(name), checkpoint, arguments)
        variables = {**DEFAULTS[engine], **(environment or {})}
        log = program(f"{engine}_serve.py", [specification, folder], variables, folder)
    return Served(
        folder,
        log,
        tiny_models.prompts(),
        json.loads((folder / "tokens.json").read_text()),
        [np.load(file) for file in sorted(folder.glob("routed-*.npy"))],
    )


def on_two_ranks(
    engine: str, name: str, checkpoint: Path, arguments: dict[str, Any], variables: dict[str, str]
) -> Served:
    """Serve on two ranks; the maps in force are written."""
    maps = {"ENGINES_MAPS": str(BELOW / "runs" / name / "maps")}
    options = {**TWO[engine], **arguments}
    return serve(engine, name, checkpoint, options, {**RANKS, **maps, **variables})


def solved(engine: str, recorded: list[Path], *options: Any) -> Path:
    """Read what an engine recorded and solve for two ranks with copies: two commands of three.

    The placement is beside the first file, and so is the trace; the plugin loads the placement.
    """
    folder = recorded[0].parent
    trace, out = folder / "trace.safetensors", folder / "placement.json"
    moetuner("convert", *recorded, "--num-experts", EXPERTS, *options, "--out", trace)
    slots = ["--devices", 2, "--slots-per-device", SLOTS]
    moetuner("solve", trace, "--for", engine, *slots, "--out", out)
    return out


def permuted(engine: str, checkpoint: Path, trace: mt.RoutingTrace) -> tuple[Served, np.ndarray]:
    """Serve a checkpoint with its experts renumbered; return also their old numbers [L,E]."""
    folder = folder_of(f"{engine}-permuted-checkpoint") / "model"
    statistics = mt.RoutingStatistics.from_trace(trace, window=32, sets=True)
    placement = mt.solve(mt.Problem(statistics, mt.Topology(devices=2))).placement
    permute_state_dict(checkpoint, placement, folder)
    order = order_of(placement)
    assert (order != np.arange(EXPERTS)).any()
    return on_two_ranks(engine, f"{engine}-permuted", folder, {}, {}), order


def ask_vllm_server(name: str, checkpoint: Path, requests: dict[str, tuple[str, dict]]) -> Path:
    """Start vLLM's HTTP server, post every request, and keep the answers as `<key>.json`.

    A request is a path and a body; the model's name is added to it.
    """
    folder, port = folder_of(name), free_port()
    command = f"exec {sys.executable} -m vllm.entrypoints.openai.api_server --model {checkpoint} "
    command += f"--served-model-name tiny --host 127.0.0.1 --port {port} --dtype float32 "
    command += "--enforce-eager --max-model-len 256 --max-num-seqs 8 --enable-return-routed-experts"
    shell = pages.Shell(folder, port, {**VLLM, "PATH": PATH})
    try:
        started = shell.start(command)
        if started.status:
            pytest.fail(f"the server did not start: {started.output}")
        for key, (path, body) in requests.items():
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}{path}",
                json.dumps({"model": "tiny", **body}).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=LIMIT) as answer:
                (folder / f"{key}.json").write_bytes(answer.read())
    finally:
        shell.close()
    return folder


def type_page(engine: str, values: dict[str, Any]) -> tuple[Path, list[pages.Typed]]:
    """Type the commands of an engine's page, as printed, with these values of its variables."""
    folder = folder_of(f"{engine}-page")
    environment = {**DEFAULTS[engine], **RANKS}
    environment |= {"PATH": PATH, "ENGINES_PYTHON": sys.executable}
    environment |= {name: str(value) for name, value in values.items()}
    shell = pages.Shell(folder, {"vllm": 8000, "sglang": 30000}[engine], environment)
    typed = []
    try:
        for command in pages.commands(f"{engine}.md"):
            typed.append(shell.type(command))
            if typed[-1].status:
                pytest.fail(f"{command}\nended with {typed[-1].status}:\n{typed[-1].output}")
    finally:
        shell.close()
    return folder, typed


def from_pip(what: str, *arguments: Any, **environment: str) -> None:
    """Fetch a package by pip, or skip with the reason why it cannot be had."""
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps", what]
    variables = {**os.environ, **environment}
    done = subprocess.run(command, check=False, env=variables, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no {what} from pip: {done.stderr.strip()[-200:]}")


def moetuner(*arguments: Any) -> str:
    """Run moetuner's command line as it is installed here; return what it wrote."""
    done = subprocess.run(
        [sys.executable, "-m", "moetuner", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def same_routing(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether tokens of [T,L,K] have the same sets of experts: their order says nothing in vLLM."""
    return np.array_equal(np.sort(ours, axis=2), np.sort(theirs, axis=2))


def order_of(placement: Any) -> np.ndarray:
    """Return the old expert at every new position [L,E] of a permuted checkpoint."""
    return np.sort(placement.slots, axis=2).reshape(placement.layers, -1)


def experts_on_ranks(placement: Path) -> list[list[list[int]]]:
    """Return every rank's experts [L,D,S] of a placement in rising order."""
    return np.sort(mt.Placement.load(placement).slots, axis=2).tolist()


def by_rank(layer_maps: list[list[int]], ranks: int) -> list[list[list[int]]]:
    """Return every rank's experts [L,D,S] in rising order: the engine chooses among its slots."""
    return np.sort(np.array(layer_maps).reshape(len(layer_maps), ranks, -1), axis=2).tolist()
