"""What importing the package does to the process that imports it: nothing."""

import importlib.metadata
import json
import subprocess
import sys

import moetuner as mt

CHECK = """
import json, logging, os, sys, threading

def logging_state():
    root = logging.root
    return root.level, list(root.handlers), sorted(root.manager.loggerDict)

before = logging_state()
import moetuner
heavy = ("torch", "rich", "highspy", "click", "matplotlib")
print(json.dumps({
    "heavy": [name for name in heavy if name in sys.modules],
    "threads": threading.active_count(),
    "native": len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1,
    "logging": logging_state() == before,
}))
"""


def test_import_is_silent_and_light():
    """Nothing is printed, no heavy module comes in, no thread starts, logging stays as it was."""
    # NumPy's linear algebra starts its own threads unless it is told not to.
    environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHECK],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert done.stderr == ""
    assert json.loads(done.stdout) == {
        "heavy": [],
        "threads": 1,
        "native": 1,
        "logging": True,
    }


def test_version_is_the_crates():
    """Distribution, package and core agree."""
    assert mt.__version__ == importlib.metadata.version("moetuner")


def test_public_names_exist():
    """Everything in __all__ is there and documented."""
    for name in mt.__all__:
        assert name == "__version__" or getattr(mt, name).__doc__
