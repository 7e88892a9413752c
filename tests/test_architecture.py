"""The house: imports go down the flow, and each foreign library has its place."""

import ast
from pathlib import Path

import pytest

import moetuner

PACKAGE = Path(moetuner.__file__).parent
# A module may import those before it, and its own part. What begins with an underscore serves all.
FLOW = [
    "trace",
    "expert_sets",
    "statistics",
    "reading",
    "topology",
    "cost",
    "placement",
    "router_groups",
    "objective",
    "balance",
    "problem",
    "solver",
    "traffic",
    "evaluation",
    "verdict",
    "audit",
    "holdout",
    "structure",
    "report",
    "formats",
    "torch",
    "cli",
]
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path, *, lazy):
    """Modules that a file imports: at import time, or with ``lazy`` anywhere."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if lazy else top_level(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            if node.module == "moetuner":
                yield from (f"moetuner.{alias.name}" for alias in node.names)
            else:
                yield node.module


def top_level(tree):
    """Statements that run at import time, without those for type checkers."""
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node


def part(module):
    """Name of the part of the flow that a module belongs to."""
    return module.split(".")[1] if module.count(".") else ""


def name(path):
    """Dotted name of a file."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_go_down_the_flow(path):
    """No module imports, when it is imported, one that comes after it."""
    own = part(name(path))
    if own in ("", "__main__"):
        return
    allowed = FLOW if own.startswith("_") else FLOW[: FLOW.index(own) + 1]
    for module in imports(path, lazy=False):
        if module.startswith("moetuner.") and not part(module).startswith("_"):
            assert part(module) in allowed, f"{own} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_foreign_libraries_have_their_place(path):
    """Torch, HiGHS, click and rich are each known to one part."""
    places = {
        "torch": "moetuner.torch",
        "transformers": "moetuner.torch",
        "highspy": "moetuner.solver.milp.highs",
        "click": "moetuner.cli",
        "rich": "moetuner.cli",
    }
    for module in imports(path, lazy=True):
        place = places.get(module.split(".")[0])
        assert place is None or name(path).startswith(place), f"{name(path)} imports {module}"
