#!/usr/bin/env bash
# Uses a wheel with the oldest dependencies that pyproject.toml allows. Usage: .ci/oldest.sh PYTHON WHEEL
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1") wheel=$(realpath "$2")
here=$(dirname "$(realpath "$0")")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
unset PYTHONPATH VIRTUAL_ENV
"$python" "$here/oldest.py" "$here/../pyproject.toml" > oldest.txt
cat oldest.txt
"$python" -m venv fresh
fresh/bin/python -m pip install --quiet --constraint oldest.txt "$wheel[parquet,report]"
fresh/bin/moetuner --version --json
fresh/bin/moetuner --self-test
fresh/bin/moetuner demo > demo.txt
fresh/bin/moetuner advise demo-output/trace.safetensors --devices 8 --report page.html > advice.txt
test -s page.html
echo "the wheel works with the oldest dependencies: $(basename "$wheel")"
