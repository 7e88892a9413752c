#!/usr/bin/env bash
# Installs a wheel into a fresh environment, far from the sources, and uses it there as a stranger would.
# Usage: tests/wheel.sh PYTHON WHEEL
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")  # not what a link leads to: that has no packages
wheel=$(realpath "$2")
tests=$(dirname "$(realpath "$0")")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
unset PYTHONPATH VIRTUAL_ENV

"$python" -m venv fresh
# The first two commands of the README, as they stand but for where the package comes from.
PATH="$folder/fresh/bin:$PATH"
sed -n '/^```sh$/,/^```$/p' "$tests/../README.md" | sed -n '2,3p' > commands.txt
diff commands.txt - << 'COMMANDS'
pip install 'moetuner[report]'
moetuner demo
COMMANDS
sed "s|moetuner\[|$wheel[|" commands.txt > commands.sh
PIP_QUIET=1 bash -eu commands.sh > demo.txt

fresh/bin/moetuner --version --json
fresh/bin/moetuner --self-test
test -s demo-output/placement.json -a -s demo-output/eplb.npz
fresh/bin/moetuner inspect demo-output/trace.safetensors > /dev/null
fresh/bin/moetuner export demo-output/placement.json --to json --out copy.json > /dev/null
fresh/bin/python - << 'CHECK'
from importlib.resources import files

import moetuner as mt

assert "fresh" in mt.__file__, mt.__file__
assert (files("moetuner") / "py.typed").is_file()
trace = mt.RoutingTrace.load("demo-output/trace.safetensors")
placement = mt.Placement.load("demo-output/placement.json")
assert placement == mt.Placement.load("copy.json")
before = mt.evaluate(placement, trace).crossing
assert 0 < before < 0.7, before
CHECK
# The notebook, by what the extra brings and no more.
fresh/bin/python "$tests/documents/notebooks.py" "$tests/../examples/figures.ipynb"
echo "the wheel works: $(basename "$wheel")"
