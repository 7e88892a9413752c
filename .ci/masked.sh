#!/usr/bin/env bash
# The self-test on emulated processors, which have no AVX-512, and no AVX2 either.
# Usage: .ci/masked.sh PYTHON, whose environment has moetuner
set -euo pipefail
if ! command -v qemu-x86_64 > /dev/null || test "$(uname -m)" != x86_64; then
	echo 'not run on emulated processors: no qemu-x86_64 here (qemu-user)'
	exit
fi
for processor in Nehalem Haswell; do
	echo "$processor:"
	qemu-x86_64 -cpu "$processor" "$1" -m moetuner --self-test 2> >(grep -v "TCG doesn't support" >&2)
done
