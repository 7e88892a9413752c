#!/usr/bin/env bash
# Checks what is to be uploaded: names and texts, the C library each wheel asks for, and that it keeps to Python's
# stable interface. Usage: .ci/check-wheels.sh FOLDER-OF-THE-TOOLS FILE...
set -euo pipefail
tools=$(realpath "$1")
shift
"$tools/twine" check --strict "$@"
for file in "$@"; do
	case $file in
		*-abi3-*.whl) "$tools/abi3audit" --strict "$file" ;;
		*.tar.gz) continue ;;
	esac
	case $file in
		*manylinux*)
			policy=${file##*.manylinux} policy=manylinux${policy%.whl}
			"$tools/auditwheel" show "$file" | tr '\n' ' ' | grep "platform tag: \"$policy\""
			;;
		*musllinux*)
			# Its one library is musl, which that loader knows by this name too; glibc's must not be looked at.
			"$tools/auditwheel" show --ldpaths /nowhere "$file" | grep -o '"[^"]*": [^,]*' | diff - <(echo '"libc.so": null')
			;;
	esac
	# The bill of materials of the Rust crates, the license and the types come along.
	list=$("$tools/python" -m zipfile --list "$file")
	for inside in '[.]dist-info/sboms/.*[.]json' '[.]dist-info/licenses/LICENSE' 'moetuner/py[.]typed' \
		'moetuner/selftest/answers[.]json'; do
		grep -q "$inside" <<< "$list" || { echo "$file has no $inside" >&2; exit 1; }
	done
done
