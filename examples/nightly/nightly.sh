#!/usr/bin/env bash
# Compute a new placement from what an engine recorded since the last night, if the one that serves
# has become worse, and replace its file. Whatever fails, the old placement stays. docs/nightly.md
# explains every variable.
set -euo pipefail
shopt -s nullglob

moetuner=${MOETUNER:-moetuner}
state=${STATE_DIRECTORY:-/var/lib/moetuner}
recordings=${RECORDINGS:-$state/recordings}
loads=${LOADS:-load-*.npz}
placement=${PLACEMENT:-$state/placement.json}
worse=${WORSE:-2}
gain=${GAIN:-1}
holdout=${HOLDOUT:-0.5}
keep=${KEEP:-14}

step=settings log=/dev/null reason=
exec 3>&2

# Write how the night ended: to the status file, and to standard output, or standard error.
report() {
    echo "nightly: $1"
    { echo "$(date -u +%FT%TZ) $1" >"$state/status.new" &&
        mv -f "$state/status.new" "$state/status"; } || true
}

fail() {
    reason=$1
    exit 1
}

# Run moetuner as a step, with its output in the log of the night.
run() {
    step=$1
    echo "== $*" >>"$log"
    "$moetuner" "$@" >>"$log"
}

end() {
    local status=$?
    if ((status)); then
        reason=${reason:-$(tail -n 1 "$log")}
        report "failed at $step (status $status): $reason; $placement stays as it is" >&3
    fi
    exit "$status"
}
trap end EXIT

[[ ${OPTIONS:-} ]] || fail "set OPTIONS to those of moetuner solve, such as '--devices 8 --for vllm'"
[[ ${MOVE_BUDGET:-} ]] || fail "set MOVE_BUDGET, the experts or bytes that a night may move"
read -ra options <<<"$OPTIONS"

step=lock
mkdir -p "$state/nights"
exec 9>"$state/lock"
flock --nonblock 9 || fail "another run holds $state/lock"

# Old nights, but never that of a placement which serves or may serve again.
step=prune
serving=
for file in "$placement" "$placement.previous"; do
    [[ ! -e $file ]] || serving+=$(<"$file")
done
nights=("$state"/nights/*/)
for ((i = 0; i < ${#nights[@]} - keep; i++)); do
    old=${nights[i]%/}
    [[ $serving == *"${old##*/}"* ]] || rm -rf "$old" "$old.safetensors"
done

# What the engine recorded since the last night; it then begins a new file.
step=collect
# shellcheck disable=SC2206 # a pattern
files=("$recordings"/$loads)
((${#files[@]})) || fail "no $loads in $recordings: does the engine run with MOETUNER_RECORD?"
night=$(mktemp -d "$state/nights/$(date -u +%Y%m%d-%H%M%S)-XXXX")
log=$night/log
exec 2>>"$log"
# The placement that is made of it names it; moetuner drift looks for it beside the newer ones.
counts=$night.safetensors
mkdir "$night/loads"
mv -- "${files[@]}" "$night/loads"

run convert "$night/loads" --count --out "$counts"

initial=() baseline=()
if [[ -e $placement ]]; then
    drifted=0
    run drift "$placement" "$counts" --fail-if-worse "$worse" || drifted=$?
    if ((drifted == 0)); then
        report "kept $placement: it serves these loads at most $worse % worse than before"
        exit 0
    fi
    ((drifted == 3)) || exit "$drifted"
    initial=(--initial "$placement" --move-budget "$MOVE_BUDGET")
    baseline=(--baseline "$placement")
fi

run solve "$counts" "${options[@]}" "${initial[@]}" --holdout "$holdout" --out "$night/placement.json"

refused=0
run evaluate "$night/placement.json" "$counts" "${baseline[@]}" \
    --fail-if-gain-below "$gain" --fail-if-worse "$worse" || refused=$?
if ((refused == 3)); then
    report "kept what serves: the new placement does not surely gain $gain % ($log)"
    exit 0
fi
((refused == 0)) || exit "$refused"

# A rename: the engine reads the old file or the new one, never a part.
step=replace
cp "$night/placement.json" "$placement.new"
sync "$placement.new"
if [[ -e $placement ]]; then
    cp "$placement" "$placement.previous.new"
    mv -f "$placement.previous.new" "$placement.previous"
fi
mv -f "$placement.new" "$placement"
report "replaced $placement ($night)"
