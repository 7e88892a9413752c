"""Serving judged by Frontier: first token and time per token under recorded loads.

    git clone https://github.com/NetX-lab/Frontier
    pip install ddsketch fasteners pandas plotly pyyaml scikit-learn scipy tqdm
    python bench/judge_serving.py FRONTIER LOADS... [--copies 0 4] [--requests 16] [--prefill 1024]
        [--decode 8] [--rate 16] [--work build/frontier]

Frontier (MIT) simulates an engine event by event, with kernels' times learnt from its profile of
Qwen3-30B-A3B on A800. Its random shares of experts are replaced, at run time, by those that slots
have under a placement: placed on every second window of LOADS, judged on the others, of which each
batch takes the next. Layers beyond the model's 48 are left out, so DeepSeek-V3's loads, for whose
sizes Frontier has no profile, are those of 256 experts of Qwen3's size. Ranks are four, a GPU each,
the most whose kernels are all in the profile; it knows 32 experts on a rank, so for 64 only the
number of tokens counts. Requests and their Poisson arrivals are the same for all placements.

What it sees: in steps of decode the tokens of every rank's experts, and the wait for the slowest.
A step with prefill it predicts for one rank, which has the mean of all; so that it sees placements
there, that rank is given the busiest one's tokens. What it does not see: traffic between ranks,
which it takes to be even. Its disaggregated mode takes all experts as if on one GPU, which no
placement changes, so it is left out. Kernels were profiled with even loads, so a rank's tokens
count, hardly how they are spread among its experts. Steps are of prefill or of decode, as the
profile has none of both. Forests have 20 trees, for time.

Milliseconds to the first token and per token, mean and tails over requests. Load is the imbalance
of ranks on the same windows, experts the share of their kernel in all steps: no placement can save
more.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from harness import Report, benchmark, imbalance
from numpy.typing import NDArray

import moetuner as mt

MODEL, PROFILE = "qwen3-a3b-30b-moe", "data/profiling/compute/a800/qwen3-a3b-30b-moe"
LAYERS, TOP_K, RANKS = 48, 8, 4
FORESTS = "random_forrest_execution_time_predictor_config"
NEEDED = ("ddsketch", "fasteners", "pandas", "plotly", "sklearn", "scipy", "tqdm", "yaml")

Floats = NDArray[np.float64]


def slot_shares(load: Floats, slots: NDArray[Any]) -> Floats:
    """Return the share of a layer's tokens [W,L,D*S] that slots [L,D,S] serve; -1 is empty."""
    parts = []
    for layer, row in enumerate(slots.reshape(len(slots), -1)):
        copies = np.bincount(row[row >= 0], minlength=load.shape[2])
        parts.append(np.where(row >= 0, (load[:, layer] / copies)[:, row], 0))
    shares = np.stack(parts, axis=1)
    return np.asarray(shares / shares.sum(axis=2, keepdims=True))


def placements(load: NDArray[Any], devices: int, slots: int) -> dict[str, NDArray[Any]]:
    """Place by windows of load [W,L,E]; return slots [L,D,S]."""
    problem = mt.Problem(
        mt.RoutingStatistics.from_load(load),
        mt.Topology(devices),
        objective="balance",
        slots_per_device=slots,
    )
    order = np.arange(devices * slots).reshape(devices, slots) % load.shape[2]
    placed = {"contiguous": np.stack([order] * load.shape[1])}
    for method in ("eplb", "joint"):
        placed[method] = mt.solve(problem, method).placement.slots
    return placed


def replace_loads(shares: Floats, ranks: int) -> None:
    """Give Frontier's predictor the shares of slots [W,L,D*S]; batch b is of window b modulo W."""
    from frontier.execution_time_predictor import sklearn_moe_execution_time_predictor as theirs

    predictor = theirs.SklearnMoEExecutionTimePredictor
    # As it has them: by layer, by slot; slots of a rank are neighbours.
    of_window = [
        {layer: dict(enumerate(row.tolist())) for layer, row in enumerate(window)}
        for window in shares
    ]
    lanes = predictor.predict_monolithic_decode_shared_domain_lane_moe_times_ms

    def lanes_of_window(self: Any, batch: Any, layer_id: int) -> Any:
        self._global_routing_allocations = of_window[batch.id % len(of_window)]
        return lanes(self, batch, layer_id)

    def busiest_rank(self: Any, batch: Any, layer_id: int = 0) -> dict[int, int]:
        tokens = self._build_proportional_per_expert_tokens(
            total_routed_tokens=ranks * self._get_local_ep_routed_tokens(batch),
            allocation_ratios=of_window[batch.id % len(of_window)][layer_id],
        )
        by_rank = np.array([tokens[slot] for slot in range(len(tokens))]).reshape(ranks, -1)
        return dict(enumerate(by_rank[by_rank.sum(axis=1).argmax()].tolist()))

    predictor._init_global_routing_allocations = lambda self: of_window[0]
    predictor.predict_monolithic_decode_shared_domain_lane_moe_times_ms = lanes_of_window
    predictor._get_moe_tokens_input = busiest_rank


def command(asked: Any, name: str, slots: int) -> list[str]:
    """Return the arguments of Frontier's command line."""
    work = asked.work
    replica = {
        "model_name": MODEL,
        "device": "a800",
        "attn_tensor_parallel_size": 1,
        "attn_data_parallel_size": RANKS,
        "moe_tensor_parallel_size": 1,
        "moe_expert_parallel_size": RANKS,
        "total_expert_num": RANKS * slots,
        "router_topk": TOP_K,
        "moe_routing_mode": "simulation",
    }
    forests = {
        "num_estimators": 20,
        "max_depth": 16,
        "min_samples_split": 2,
        "k_fold_cv_splits": 2,
        "num_training_job_threads": 1,
        "prediction_max_tokens_per_request": 2048,
        "prediction_max_prefill_chunk_size": 2048,
        "kv_cache_prediction_granularity": 256,
        "linear_op_input_file": work / "profile/linear_op.csv",
        "atten_input_file": work / "profile/attention.csv",
        "moe_input_file": work / "profile/moe.csv",
    }
    metrics = {"output_dir": work / "runs", "cache_dir": work / "models", "run_id": name}
    options = {
        "simulation_mode": "online",
        "sys_arch": "co-location",
        "cc_backend_config_type": "analytical",
        "cluster_config_num_replicas": 1,
        **{f"replica_config_{key}": value for key, value in replica.items()},
        "replica_scheduler_config_type": "vllm",
        "decode_cuda_graph_mode": "none",
        "request_generator_config_type": "synthetic",
        "synthetic_request_generator_config_num_requests": asked.requests,
        "length_generator_config_type": "fixed",
        "fixed_request_length_generator_config_prefill_tokens": asked.prefill,
        "fixed_request_length_generator_config_decode_tokens": asked.decode,
        "interval_generator_config_type": "poisson",
        "poisson_request_interval_generator_config_qps": asked.rate,
        **{f"metrics_config_{key}": value for key, value in metrics.items()},
        **{f"{FORESTS}_{key}": value for key, value in forests.items()},
    }
    off = ("store_plots", "enable_chrome_trace", "write_json_trace")
    return [
        *(word for key, value in options.items() for word in (f"--{key}", str(value))),
        "--metrics_config_write_metrics",
        "--metrics_config_store_request_metrics",
        *(f"--no-metrics_config_{name}" for name in off),
    ]


def _simulate(checkout: Path, shares: Floats, words: Sequence[str]) -> None:
    """Run Frontier in this process, quietly."""
    os.environ |= {"FRONTIER_LOG_LEVEL": "ERROR", "WANDB_DISABLED": "true"}
    os.chdir(checkout)
    sys.path.insert(0, str(checkout))
    sys.argv = ["frontier", *words]
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        from frontier.main import main

        replace_loads(shares, RANKS)
        main()


def simulated(asked: Any, shares: Mapping[str, Floats], slots: int) -> dict[str, list[float]]:
    """Return the share of experts in all steps, and milliseconds to the first and per token.

    Milliseconds are mean, 95th and 99th percentile of either. All simulations run at once, each in
    a process of its own, in which nothing was replaced yet.
    """
    for old in asked.work.glob("runs/**/*.json*"):
        old.unlink()
    fresh = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        works = []
        for name, share in shares.items():
            pool = stack.enter_context(ProcessPoolExecutor(1, mp_context=fresh))
            works.append(pool.submit(_simulate, asked.frontier, share, command(asked, name, slots)))
        for work in works:
            work.result()
    return {name: figures(asked, name) for name in shares}


def figures(asked: Any, name: str) -> list[float]:
    """Read what a simulation wrote."""
    (path,) = asked.work.glob(f"runs/**/{name}/system_metrics.json")
    metrics = json.loads(path.read_text())
    assert metrics["simulation_metadata"]["completed_requests"] == asked.requests
    steps = path.with_name("frontier_stage_batch_ledger.jsonl").read_text().splitlines()
    parts = [json.loads(step)["execution_time"]["component_ledger_ms"] for step in steps]
    experts = sum(step["moe_grouped_gemm_time"] for step in parts) / sum(
        sum(step.values()) for step in parts
    )
    kinds = [metrics[f"{kind}_statistics"] for kind in ("ttft", "tpot")]
    return [experts, *(kind[figure] for kind in kinds for figure in ("mean", "p95", "p99"))]


def with_metadata(checkout: Path, work: Path) -> None:
    """Write the profile with the columns that Frontier asks for, by its own tool."""
    tool = [sys.executable, "-m", "frontier.profiling.migrate_csv_metadata"]
    says = ["--profiling_precision", "BF16", "--measurement_type", "CUDA_EVENT"]
    says += ["--model_arch", "generic", "--model_architecture_profile", "generic"]
    folders = ["--input_dir", str(checkout / PROFILE), "--output_dir", str(work / "profile")]
    subprocess.run([*tool, *folders, *says], cwd=checkout, check=True, capture_output=True)


def judged(report: Report, loads: Path, asked: Any, copies: int) -> None:
    """Print a table of placements of these loads."""
    statistics = mt.open_input(loads)
    load = statistics.window_load[:, :LAYERS]
    slots = load.shape[2] // RANKS + copies
    table = report.table(
        f"{statistics.model} on {RANKS} ranks with {slots} slots each",
        "placement <12s",
        "load 7.3f",
        "experts 8.1%",
        "TTFT mean 9.2f",
        "p95 8.2f",
        "p99 8.2f",
        "TPOT mean 9.3f",
        "p95 8.3f",
        "p99 8.3f",
    )
    unseen = load[1::2].astype(np.float64)
    placed = placements(load[::2], RANKS, slots)
    shares = {name: slot_shares(unseen, each) for name, each in placed.items()}
    found = simulated(asked, shares, slots)
    for name, each in placed.items():
        table(name, imbalance(unseen, each).mean(), *found[name])
    ours = np.array(found["joint"])
    first, beside = (100 * (1 - ours / found[name]) for name in ("contiguous", "eplb"))
    report.say(
        f"Joint saves {first[1]:.1f} % of contiguous's mean time to the first token and "
        f"{first[4]:.1f} % of its time per token, {beside[1]:.1f} and {beside[4]:.1f} % of EPLB's."
    )


def main() -> None:
    """Print a table for every file of loads and number of copies."""
    files = {"frontier": Path, "loads": [Path()]}
    numbers = {"copies": [0, 4], "requests": 16, "prefill": 1024, "decode": 8}
    others = {"rate": 16.0, "work": Path("build/frontier")}
    with benchmark(__doc__, files, **numbers, **others) as (asked, report):
        asked.frontier, asked.work = asked.frontier.resolve(), asked.work.resolve()
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if missing or not (asked.frontier / PROFILE / "moe.csv").exists():
            what = f"the packages {', '.join(missing)}" if missing else f"{PROFILE} in FRONTIER"
            print(f"Nothing can run: needs {what}", file=sys.stderr)
            raise SystemExit(2)
        with_metadata(asked.frontier, asked.work)
        for loads, copies in itertools.product(asked.loads, asked.copies):
            judged(report, loads, asked, copies)


if __name__ == "__main__":
    main()
