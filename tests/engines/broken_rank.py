"""Break moetuner on one rank of an engine, as `ENGINES_BREAK=RANK:HOW` says.

The engines' stand-ins import this module before any plugin is registered. `HOW` is `missing` (its
placement is not there), `other` (it is `ENGINES_OTHER`), `variable` (one makes no sense), `unset`
(none is set), `raise` (its decisions fail) or `kill-N` (SIGKILL in its decision number N).
"""

import multiprocessing
import os
import re
import signal
import sys

# Ranks of a busy machine may come late; a rank that never comes is not waited for that long.
PATIENT, SHORT = 300.0, 20.0


def rank_of_this_process():
    """Return the rank that this process is going to be, None where it is none."""
    if name := re.fullmatch(r"VllmWorker-(\d+)", multiprocessing.current_process().name):
        return int(name[1])
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "run_scheduler_process":
            return frame.f_locals["tp_rank"]
        frame = frame.f_back
    return None


def fail(*arguments):
    """Fail, in the place of a decision."""
    raise RuntimeError("broken on purpose")


def apply():
    """Break this process if it is the rank."""
    from moetuner.plugins import decision, sglang, verdicts, vllm

    setting = os.environ.get("ENGINES_BREAK", ":")
    rank, how = setting.split(":")
    wait = SHORT if how == "unset" or how.startswith("kill") else PATIENT
    verdicts.WAIT = vllm.WAIT_AT_LOAD = sglang.WAIT_AT_LOAD = wait
    if str(rank_of_this_process()) != rank:
        return
    if how == "missing":
        os.environ["MOETUNER_PLACEMENT"] = "/nonexistent/placement.json"
    elif how == "other":
        os.environ["MOETUNER_PLACEMENT"] = os.environ["ENGINES_OTHER"]
    elif how == "variable":
        os.environ["MOETUNER_REBALANCE"] = "perhaps"
    elif how == "unset":
        for name in [name for name in os.environ if name.startswith("MOETUNER_")]:
            del os.environ[name]
    elif how == "raise":
        decision.Case.make_map = fail
    elif how.startswith("kill-"):
        calls, inner = [], decision.Case.make_map

        def make_map(*arguments):
            calls.append(1)
            if len(calls) == int(how.removeprefix("kill-")):
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*arguments)

        decision.Case.make_map = make_map


apply()
