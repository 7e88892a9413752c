"""run(): a notebook's cells one after the other, as Jupyter runs them; a script runs one.

Usage: notebooks.py NOTEBOOK. It must show something, with the package that is installed.
"""

import ast
import json
import sys
from pathlib import Path
from typing import Any


def run(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """Run the cells; return the names that they made, and the values that they show."""
    names: dict[str, Any] = {}
    shown = []
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
    return names, shown


if __name__ == "__main__":
    made, values = run(Path(sys.argv[1]))
    package = Path(made["mt"].__file__)
    assert package.is_relative_to(sys.prefix), package
    trace, *figures = values
    assert figures, values
    # What a notebook puts on the screen.
    assert "RoutingTrace" in trace._repr_html_()
    assert all(json.loads(figure.to_json())["data"] for figure in figures)
