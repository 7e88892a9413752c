"""``moetuner --version`` and ``--self-test``: describe and check the installation."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import click

from moetuner._core import __version__, instruction_sets

DIFFERENT = 1
# Distributions whose versions a report of a fault needs, where they are installed.
LIBRARIES = ("numpy", "highspy", "click", "rich", "pyarrow", "plotly", "torch", "transformers")
ENGINES = ("vllm", "sglang", "vllm-ascend", "tensorrt-llm", "megatron-core", "deepspeed")


def describe_installation() -> dict[str, Any]:
    """Return versions of all that may cause a fault, and the processor's instruction sets."""
    import platform

    return {
        "moetuner": __version__,
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "free_threaded": not getattr(sys, "_is_gil_enabled", lambda: True)(),
        "system": platform.system(),
        "release": platform.release(),
        "libc": " ".join(platform.libc_ver()).strip(),
        "machine": platform.machine(),
        "instruction_sets": instruction_sets(),
        "processors": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "libraries": find_versions(LIBRARIES),
        "engines": find_versions(ENGINES),
    }


def find_versions(distributions: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of installed distributions, without importing them."""
    import importlib.metadata

    versions = {}
    for distribution in distributions:
        try:
            versions[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def say_version(context: click.Context, as_json: bool) -> None:
    """Print the version, or as JSON all that a report of a fault asks for, and end."""
    text = f"moetuner {__version__}"
    click.echo(json.dumps(describe_installation(), indent=2) if as_json else text)
    context.exit()


def check_answers(context: click.Context) -> None:
    """Compare this machine's answers with those stored, print one line, and end with 0 or 1."""
    import platform

    from moetuner import selftest

    start = time.monotonic()
    differences = selftest.find_differences()
    sets = ", ".join(instruction_sets()) or "no instruction sets beyond the oldest"
    where = f"moetuner {__version__}, {platform.machine()}, {sets}"
    count = len(selftest.read_hashes())
    if differences:
        names = "; ".join(differences)
        click.echo(f"self-test: {len(differences)} of {count} answers differ: {names} ({where})")
        context.exit(DIFFERENT)
    seconds = time.monotonic() - start
    click.echo(f"self-test: all {count} answers are right ({where}, {seconds:.1f} s)")
    context.exit()
