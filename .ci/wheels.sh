#!/usr/bin/env bash
# Builds wheels for Linux by zig, which links against as old a glibc as it is told. For each target that rustc has: one
# for CPython 3.10 and newer, and one for the free-threaded 3.14. Neither has to be here.
# Usage: .ci/wheels.sh FOLDER-OF-THE-TOOLS FOLDER-FOR-WHEELS
set -euo pipefail
tools=$(realpath "$1") out=$2
cd "$(dirname "$0")/.."
export PATH="$tools:$PATH"
library="$(rustc --print sysroot)/lib/rustlib"
rm -rf "$out"
for target in {x86_64,aarch64}-unknown-linux-{gnu,musl}; do
	if ! test -d "$library/$target/lib"; then
		echo "no wheel for $target: rustup target add $target"
		continue
	fi
	case $target in
		*-gnu) policy=manylinux_2_17 ;;
		*-musl) policy=musllinux_1_2 ;;
	esac
	maturin build --release --quiet --zig --target "$target" --compatibility "$policy" --out "$out" \
		--interpreter python3.10 python3.14t
done
ls "$out"
