#!/usr/bin/env bash
# Every benchmark on one GPU, most important first; each part takes less than ten minutes.
#
#   benchmarks/run_all.sh [--budget quick|full] [--out FOLDER] [--parts "decode train ..."] [--limit SECONDS] [--keep]
#
# With --budget quick all parts together take about nine minutes: fewer repetitions, less work for the peers. Rows are
# printed and written as they come; --limit (seconds for everything) cuts what does not fit, and loses no finished row.
# The models that were written are removed at the end; --keep leaves them for the next run.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1

budget=full
out=benchmarks/results
parts=""
limit=0
keep=0
while [ $# -gt 0 ]; do
    case "$1" in
        --budget) budget=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        --parts) parts=$2; shift 2 ;;
        --limit) limit=$2; shift 2 ;;
        --keep) keep=1; shift ;;
        *) sed -n '2,9p' "$0"; exit 2 ;;
    esac
done

if [ -z "$parts" ]; then
    parts="decode train loss_head memory grpo constrained parity attention_decode"
    [ "$budget" = full ] && parts="$parts startup cpu"
fi

python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
date=$(date -u +%F)
suffix=""
[ "$budget" = quick ] && suffix="-quick"
started=$SECONDS
failed=0
folder=harmony-benchmarks-$(id -u)
[ "$keep" = 1 ] || trap 'rm -rf "/dev/shm/$folder" "${TMPDIR:-/tmp}/$folder"' EXIT

for part in $parts; do
    script=benchmarks/$part.py
    [ -f "$script" ] || { echo "=== $part: no such benchmark"; continue; }
    most=600
    if [ "$limit" -gt 0 ]; then
        left=$((limit - (SECONDS - started)))
        [ "$left" -lt 20 ] && { echo "=== $part: not run, no time left"; continue; }
        [ "$left" -lt "$most" ] && most=$left
    fi
    flags=""
    [ "$budget" = quick ] && grep -q -- '--quick' "$script" && flags="--quick"
    echo "=== $part ($budget), at $((SECONDS - started)) s, at most $most s"
    # shellcheck disable=SC2086
    timeout --signal=INT --kill-after=20 "$most" "$python" "$script" $flags --json "$out/$date-$part$suffix.json"
    code=$?
    [ $code -ne 0 ] && { echo "=== $part: exit code $code"; failed=1; }
done
echo "=== $((SECONDS - started)) s in all"
exit $failed
