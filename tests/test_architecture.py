"""The house: data flows one way, every arrow is counted, each foreign library has its place."""

import ast
from functools import cache
from pathlib import Path

import pytest

import moetuner

PACKAGE = Path(moetuner.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
VALUES = ("trace", "statistics", "topology", "cost", "placement")
SOLVER = ("evaluation", "problem", *VALUES)

# What a room may import besides itself, `_checks` and `_core`. A room is a folder or a module; the
# longest name that fits a module is its room.
MAY_IMPORT = {
    "_checks": (),
    "presets": (),
    "files": (),
    "trace": ("files",),
    "statistics": ("trace", "files"),
    "topology": ("presets", "files"),
    "cost": ("topology", "presets", "files"),
    "placement": ("topology", "files"),
    "router_groups": ("statistics", "placement"),
    "evaluation": VALUES,
    "formats": (*VALUES, "files"),
    "problem": (*VALUES, "evaluation"),
    "solver.result": ("solver.bounds.certificate", *SOLVER),
    "solver.effort": (),
    "solver.bounds.certificate": ("files", "topology"),
    "solver.search": ("solver.result", "solver.effort", *SOLVER),
    "solver.exact": ("solver.result", "solver.effort", *SOLVER),
    # A proof may rest on having tried everything.
    "solver.bounds": ("solver.exact", "solver.result", "solver.effort", *SOLVER),
    "solver.milp": ("solver.result", "solver.effort", "solver.bounds", *SOLVER),
    "solver.two_stage": ("solver.milp", "solver.result", "solver.effort", *SOLVER),
    "solver.balancing": ("solver.effort", "placement"),
    "solver.baselines": (
        "solver.search",
        "solver.balancing",
        "solver.result",
        "solver.effort",
        *SOLVER,
    ),
    "solver": SOLVER,
    "report": ("solver", *SOLVER),
    "plugins": ("solver", "formats", *VALUES),
    "torch": ("solver", "files", *SOLVER),
    "cli": ("report", "formats", "solver", "torch", "files", "presets", "router_groups", *SOLVER),
}
# Rooms where a foreign library is known.
PLACES = {
    "torch": ("torch",),
    "transformers": ("torch",),
    "highspy": ("solver.milp.highs",),
    "click": ("cli",),
    "rich": ("cli",),
}


def name(path):
    """Dotted name of a file, without the package's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


KNOWN = {name(path) for path in MODULES} | {"_core"}


@cache
def imports(path):
    """Modules that a file imports: at the top, in functions, and for type checkers alike."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner.removeprefix("moetuner.") in KNOWN
                found.add(inner if is_module else node.module)
    return frozenset(found)


def own_imports(path):
    """Modules of the package that a file imports, without the package's name."""
    mine = name(path)
    for module in imports(path):
        if module == "moetuner":
            yield ""
        elif module.startswith("moetuner.") and module != f"moetuner.{mine}":
            yield module.removeprefix("moetuner.")


def room(module):
    """Room of a module."""
    fitting = [r for r in MAY_IMPORT if module == r or module.startswith(f"{r}.")]
    return max(fitting, key=len, default="")


def is_in(module, rooms):
    """Whether a module is one of the rooms, or inside one."""
    return any(module == r or module.startswith(f"{r}.") for r in rooms)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_go_down_the_flow(path):
    """Every import of a module, wherever it stands, is of a room that its own may import."""
    mine = room(name(path))
    if name(path) in ("", "__main__"):
        return
    assert mine, f"{name(path)} is in no room of MAY_IMPORT"
    allowed = (mine, "_checks", "_core", *MAY_IMPORT[mine])
    for module in own_imports(path):
        assert module, f"{name(path)} imports the package itself; import the module"
        assert is_in(module, allowed), f"{name(path)} imports {module}"


def test_no_circle_of_modules():
    """No module reaches itself by imports."""
    arrows = {name(path): {m for m in own_imports(path) if m in KNOWN} for path in MODULES}
    arrows[""] = arrows["_core"] = set()
    done, path = set(), []

    def walk(module):
        assert module not in path, f"circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module in done:
            return
        path.append(module)
        for other in sorted(arrows[module]):
            walk(other)
        path.pop()
        done.add(module)

    for module in sorted(arrows):
        walk(module)


def test_the_top_level_is_short():
    """The package has at most ten modules at its top, one of them private."""
    top = [path.stem for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "__main__")]
    assert len(top) <= 10, top
    assert [stem for stem in top if stem.startswith("_")] == ["_checks"]


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_foreign_libraries_have_their_place(path):
    """Torch, HiGHS, click and rich are each known to one part."""
    for module in imports(path):
        places = PLACES.get(module.split(".")[0])
        assert places is None or is_in(name(path), places), f"{name(path)} imports {module}"
