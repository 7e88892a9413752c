"""Measure what a placement gains, by exchanging the map of one running server (vLLM or SGLang).

    python examples/ab_vllm.py MODEL placed.json \
        --server="--tensor-parallel-size 8 --enable-expert-parallel" \
        --client="--dataset-name sharegpt --dataset-path FILE --max-concurrency 64"

Enters: a model, a placement that `moetuner solve` wrote for the engine, options of its server, and
options of its benchmark client. What comes out is one sentence: how many more tokens per second,
with an interval, and whether that is certain.

One server runs from the first measurement to the last. Two servers, one for each map, differ for
other reasons than their maps (memory, clocks, the order of starts): a false gain of 15 % was
published from such a trial, and retracted. Here moetuner's plugin exchanges the map while the
server runs, in the order ABBA, so that a machine that becomes slower counts for neither arm. Both
runs of a pair send the same requests to an empty prefix cache. A run counts only if the log says
that all ranks serve the map of its arm.

Equal maps give a certain gain or loss in one of twenty trials: `--own placed.json` tries it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import moetuner as mt
from moetuner.evaluation.intervals import FEWEST, Spread
from moetuner.plugins.files import Stored

HOST = "127.0.0.1"
# Arms: the map that the engine starts with, and the placement.
OWN, OURS = "own", "ours"
# What is measured in a run, whether more of it is better, and its name in the sentence.
MEASURES = {
    "throughput": (True, "Tokens per second"),
    "tpot": (False, "Mean time per output token"),
}
# Lines of the plugin after which ranks may serve another map than that of the arm.
REFUSALS = "read again, not taken", "all ranks take the engine's own map"
# Seeds of requests that do not count; pairs have the seeds 0, 1, ...
WARM_UP_SEED = 10_000


def describe_stored(path: Path, placement: mt.Placement) -> Stored:
    """Return what the plugin's log says of a placement that it reads from a file."""
    return Stored(path, placement.filled(), placement.checksum, made=0.0)


@dataclass(frozen=True)
class Engine:
    """How an engine is started, asked to forget prefixes, and measured by its own client.

    Parameters
    ----------
    command
        Function from model, placement and steps between two decisions to a command.
    forget
        Path of the request that empties the prefix cache.
    client
        Function that runs the benchmark client with arguments; it returns the client's results.
    options
        Options of the client.
    """

    command: Callable[[str, mt.Placement, int], list[str]]
    forget: str
    client: Callable[[list[str], Path], dict[str, Any]]
    options: tuple[str, ...]


def count_copies(placement: mt.Placement) -> int:
    """Return how many slots of a layer an engine has beyond one for each expert."""
    return placement.devices * placement.slots_per_device - placement.num_experts


def command_of_vllm(model: str, placement: mt.Placement, steps: int) -> list[str]:
    """Return the command that starts vLLM; its balancer is synchronous, so maps change whole."""
    balancer = {
        "num_redundant_experts": count_copies(placement),
        "step_interval": steps,
        "window_size": steps,
        "use_async": "false",
    }
    words = [f"--eplb-config.{name}={value}" for name, value in balancer.items()]
    return ["vllm", "serve", model, "--enable-eplb", *words]


def command_of_sglang(model: str, placement: mt.Placement, steps: int) -> list[str]:
    """Return the command that starts SGLang with the plugin's balancer."""
    words = ["--enable-eplb", "--eplb-algorithm", "moetuner"]
    words += ["--eplb-rebalance-num-iterations", str(steps)]
    words += ["--ep-num-redundant-experts", str(count_copies(placement))]
    return [sys.executable, "-m", "sglang.launch_server", "--model", model, *words]


def run_client_of_vllm(arguments: list[str], folder: Path) -> dict[str, Any]:
    """Run what `vllm bench serve` runs, in this process; return its results."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    return main(parser.parse_args(arguments))


def run_client_of_sglang(arguments: list[str], folder: Path) -> dict[str, Any]:
    """Run what `python -m sglang.benchmark.serving` runs, in this process; return its results."""
    from sglang.benchmark.serving import cli_main

    results = folder / "client.jsonl"
    sys.argv = ["serving", *arguments, "--output-file", str(results)]
    cli_main()
    return json.loads(results.read_text().splitlines()[-1])


ENGINES = {
    "vllm": Engine(command_of_vllm, "/reset_prefix_cache", run_client_of_vllm, ()),
    "sglang": Engine(
        command_of_sglang, "/flush_cache", run_client_of_sglang, ("--warmup-requests", "0")
    ),
}


class Server:
    """One server from the first run to the last, and the map that it serves.

    Parameters
    ----------
    options
        Options of the command line.
    arms
        The placement of each arm.
    """

    def __init__(self, options: argparse.Namespace, arms: dict[str, mt.Placement]) -> None:
        self.options, self.arms, self.engine = options, arms, ENGINES[options.engine]
        self.folder = options.folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        # The file that the plugin reads again whenever it changes.
        self.live, self.log = self.folder / "live.json", self.folder / "server.log"
        with socket.socket() as free:
            free.bind((HOST, 0))
            self.port = free.getsockname()[1]
        self.url = f"http://{HOST}:{self.port}"
        self.arm = OWN
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        """Start the server with the engine's own map, and wait until it answers."""
        self.arms[OWN].save(self.live)
        command = self.engine.command(self.options.model, self.arms[OWN], self.options.steps)
        if shutil.which(command[0]) is None:
            raise ValueError(f"{command[0]} is not on the path: run this where the engine is")
        command += ["--host", HOST, "--port", str(self.port), *shlex.split(self.options.server)]
        # vLLM empties its prefix cache on request only in this mode.
        variables = {"VLLM_SERVER_DEV_MODE": "1"}
        variables |= {"MOETUNER_PLACEMENT": str(self.live), "MOETUNER_RELOAD": str(self.live)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **variables},
                start_new_session=True,
            )
        try:
            self.wait_for("an answer of the server", self.answers)
            self.check()
            if "moetuner: in force: " not in self.log.read_text(errors="replace"):
                raise ValueError(f"the engine does not run moetuner's map: see {self.log}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """End the server and its workers."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def answers(self) -> bool:
        """Return whether the server answers."""
        with contextlib.suppress(OSError, urllib.error.URLError):
            urllib.request.urlopen(f"{self.url}/health", timeout=10).close()
            return True
        time.sleep(1)
        return False

    def wait_for(self, what: str, is_there: Callable[[], bool]) -> None:
        """Wait until something is there; raise if the server ends or it takes too long."""
        deadline = time.monotonic() + self.options.patience
        while not is_there():
            if self.process is None or self.process.poll() is not None:
                raise ValueError(f"the server ended: see {self.log}")
            if time.monotonic() > deadline:
                raise ValueError(f"no {what} in {self.options.patience} s: see {self.log}")

    def check(self) -> None:
        """Raise if a line of the log says that a map was refused."""
        for line in self.log.read_text(errors="replace").splitlines():
            if "moetuner: " in line and any(text in line for text in REFUSALS):
                raise ValueError(f"a map was refused: {line[line.index('moetuner: ') :]}")

    def serve(self, arm: str) -> None:
        """Exchange the map for that of an arm, and send requests until all ranks serve it."""
        begin, placement = self.log.stat().st_size, self.arms[arm]
        stored = describe_stored(self.live, placement)
        lines = [f"moetuner: read its files again: serves {stored};"]
        if not has_same_experts(placement, self.arms[self.arm]):
            lines.append(f"moetuner: {self.live} ({stored.checksum}): ")
        placement.save(self.live)

        def is_served() -> bool:
            self.run_client(WARM_UP_SEED, "--num-prompts", str(self.options.warm_up))
            self.check()
            text = self.log.read_bytes()[begin:].decode(errors="replace")
            return all(line in text for line in lines)

        self.wait_for(f"map of {arm}", is_served)
        self.arm = arm

    def measure(self, seed: int) -> dict[str, Any]:
        """Return what the client measures for the arm that is served."""
        request = urllib.request.Request(f"{self.url}{self.engine.forget}", method="POST")
        with urllib.request.urlopen(request, timeout=self.options.patience) as answer:
            if b'"success":false' in answer.read().replace(b" ", b""):
                raise ValueError("the prefix cache was not emptied: do others use this server?")
        result = self.run_client(seed)
        self.check()
        tokens = result["total_input_tokens"] + result["total_output_tokens"]
        return {
            "arm": self.arm,
            "map": self.arms[self.arm].checksum,
            "seed": seed,
            "requests": result["completed"],
            "throughput": tokens / result["duration"],
            "tpot": float(result["mean_tpot_ms"]),
        }

    def run_client(self, seed: int, *more: str) -> dict[str, Any]:
        """Run the engine's client once; what it prints goes to a file."""
        arguments = ["--base-url", self.url, "--model", self.options.model, "--disable-tqdm"]
        arguments += [*self.engine.options, *shlex.split(self.options.client)]
        arguments += ["--seed", str(seed), *more]
        with (
            (self.folder / "client.log").open("a") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            result = self.engine.client(arguments, self.folder)
        if result.get("failed") or not result["completed"]:
            raise ValueError(f"requests failed: see {self.folder / 'client.log'}")
        return result


def has_same_experts(placement: mt.Placement, other: mt.Placement) -> bool:
    """Return whether every rank has the same experts: engines choose among its slots."""
    return np.array_equal(np.sort(placement.slots, axis=2), np.sort(other.slots, axis=2))


def make_first_map(placement: mt.Placement) -> mt.Placement:
    """Return the map with which engines start: experts in order, and then the first ones again."""
    shape = placement.devices, placement.slots_per_device
    row = (np.arange(np.prod(shape)) % placement.num_experts).reshape(shape)
    return mt.Placement([row] * placement.layers, num_experts=placement.num_experts)


def order_arms(rounds: int) -> list[tuple[str, str]]:
    """Return the arms of each round in the order of their runs: ABBA."""
    return [(OURS, OWN) if number % 2 else (OWN, OURS) for number in range(rounds)]


def estimate_change(own: Sequence[float], ours: Sequence[float]) -> Spread:
    """Estimate the mean of log(ours / own) of pairs: exchanging the arms changes its sign alone."""
    logs = np.log(np.array(ours) / np.array(own))
    error = float(logs.std(ddof=1) / np.sqrt(logs.size))
    return Spread(float(logs.mean()), error, logs.size - 1, logs.size)


def judge(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return change, interval and verdict of every measure, in which runs of a pair are compared.

    A measure that a run does not have is left out: answers of one token have no TPOT.
    """
    seeds = sorted({run["seed"] for run in runs})
    arms = {arm: {run["seed"]: run for run in runs if run["arm"] == arm} for arm in (OWN, OURS)}
    judged = {}
    for measure, (more_is_better, _) in MEASURES.items():
        if any(run[measure] <= 0 for run in runs):
            continue
        own, ours = ([arms[arm][seed][measure] for seed in seeds] for arm in (OWN, OURS))
        change = estimate_change(own, ours)
        low, high = change.interval or (-np.inf, np.inf)
        verdict = "uncertain"
        if change.is_enough and not low <= 0 <= high:
            verdict = "gain" if (low > 0) == more_is_better else "loss"
        ends = {name: float(np.expm1(value)) for name, value in change.to_dict().items()}
        judged[measure] = {**ends, "pairs": change.units, "verdict": verdict}
    return judged


def write_sentence(measure: str, judged: dict[str, dict[str, Any]]) -> str:
    """Return the sentence that answers the trial."""
    name = MEASURES[measure][1]
    if measure not in judged:
        return f"{name}: not measured, as the answers are too short."
    answer = judged[measure]
    value, low, high = (f"{100 * answer[key]:+.1f}" for key in ("value", "low", "high"))
    verdict = {"gain": "a certain gain", "loss": "a certain loss"}.get(answer["verdict"])
    if verdict is None:
        is_enough = answer["pairs"] >= FEWEST
        why = "the interval contains 0" if is_enough else f"{FEWEST} pairs or more say more"
        verdict = f"no certain change ({why})"
    interval = f"95 % interval {low} to {high} %, {answer['pairs']} pairs"
    return f"{name}: {value} % ({interval}): {verdict}."


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", help="Model, as the engine takes it.")
    parser.add_argument("placement", type=Path, help="Placement that moetuner wrote.")
    parser.add_argument("--own", type=Path, help="Map to compare with (the engine's first map).")
    parser.add_argument("--engine", choices=ENGINES, default="vllm")
    parser.add_argument("--server", default="", metavar="OPTIONS", help="Options of the server.")
    parser.add_argument("--client", default="", metavar="OPTIONS", help="Options of the client.")
    parser.add_argument("--rounds", type=int, default=10, help="Pairs of runs, an even number.")
    parser.add_argument("--measure", choices=MEASURES, default="throughput")
    parser.add_argument("--warm-up", type=int, default=32, help="Requests after an exchange.")
    parser.add_argument("--steps", type=int, default=100, help="Steps until a map is exchanged.")
    parser.add_argument("--patience", type=int, default=1800, help="Seconds for start, exchange.")
    parser.add_argument("--folder", type=Path, default=Path("ab"), help="Folder for the logs.")
    parser.add_argument("--json", metavar="FILE", help="File for all figures, - for the output.")
    options = parser.parse_args()
    if options.rounds < 2 or options.rounds % 2:
        parser.error(f"--rounds must be even and at least 2 (ABBA), got {options.rounds}")
    return options


def main() -> None:
    """Start the server, measure both arms in turns, and print the sentence."""
    options = read_options()
    # Who ends this process ends the server with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    runs = []
    try:
        ours = mt.Placement.load(options.placement).filled()
        own = mt.Placement.load(options.own).filled() if options.own else make_first_map(ours)
        if own.slots.shape != ours.slots.shape:
            raise ValueError(f"{options.own}: has other layers, ranks or slots than the placement")
        with Server(options, {OWN: own, OURS: ours}) as server:
            server.measure(WARM_UP_SEED)
            for seed, pair in enumerate(order_arms(options.rounds)):
                for arm in pair:
                    server.serve(arm)
                    runs.append(server.measure(seed))
                    print(f"{len(runs)}/{2 * options.rounds} {runs[-1]}", file=sys.stderr)
    except (ValueError, OSError) as error:
        sys.exit(f"ab_vllm.py: {error}")
    judged = judge(runs)
    sentence = write_sentence(options.measure, judged)
    if options.json:
        answer = {"sentence": sentence, "measure": options.measure, "change": judged, "runs": runs}
        text = json.dumps(answer, indent=2)
        print(text) if options.json == "-" else Path(options.json).write_text(text + "\n")
    if options.json != "-":
        print(sentence)


if __name__ == "__main__":
    main()
