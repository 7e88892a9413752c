#!/usr/bin/env bash
# Tests of threads on the Python that is given, free-threaded or not, with what they need and no more.
# Usage: .ci/threads.sh PYTHON
set -euo pipefail
python=$(command -v "$1")
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH VIRTUAL_ENV
"$python" -m venv "$folder/fresh"
"$folder/fresh/bin/python" -m pip install --quiet pytest .
"$folder/fresh/bin/moetuner" --version --json
"$folder/fresh/bin/python" -m pytest -q --config-file /dev/null --rootdir . --noconftest tests/selftest \
	tests/test_processes.py::test_children_forked_among_busy_threads_work
