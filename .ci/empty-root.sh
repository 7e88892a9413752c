#!/usr/bin/env bash
# Uses a wheel in the root of a Debian that has its smallest set of packages and Python, and nothing else.
# Usage: .ci/empty-root.sh WHEEL
set -euo pipefail
wheel=$(realpath "$1")
cd "$(dirname "$0")/.."
skip() {
	echo "not used in an empty root: $1"
	exit
}
command -v debootstrap > /dev/null || skip 'no debootstrap here (apt-get install debootstrap)'
test "$(id -u)" = 0 || skip 'debootstrap and chroot want the rights of root (sudo make test-root)'
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include=ca-certificates,python3-venv bookworm "$root" > "$root/log" 2>&1 \
	|| { tail -n 3 "$root/log" >&2; skip 'Debian cannot be had (no network?)'; }
mkdir "$root/moetuner"
cp -r --parents README.md tests/wheel.sh tests/documents/notebooks.py examples/figures.ipynb "$wheel" "$root/moetuner"
# A network may have certificates of its own, which this machine knows.
cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root \
	PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
	/moetuner/tests/wheel.sh /usr/bin/python3 "/moetuner$wheel"
