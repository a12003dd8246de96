#!/usr/bin/env bash
# What a machine with a GPU should run, in two calls:
#
#   benchmarks/gpu_run.sh FOLDER first     7 minutes: races, selftest, loss, matching
#   benchmarks/gpu_run.sh FOLDER second    4 minutes, after a change: races, selftest, the loss again, the other tests
#
# The next stage runs even if one fails. What comes back is FOLDER.tar.gz, renewed after every stage. Variables:
#   PYTHON    the interpreter: with torch for this GPU, triton, einops, numpy, pillow, pytest, pytest-timeout, hypothesis
#   COMMIT    what is measured, where there is no .git: COMMIT=$(git describe --always --dirty --exclude='*')
#   OPTIONS   of the benchmarks, and PATIENCE, a factor on every limit: for a rehearsal on a slow machine without a
#             GPU: OPTIONS="--toy --device cpu --seconds 0.01" PATIENCE=10
set -uo pipefail
if (($# != 2)) || [[ ! $2 =~ ^(first|second)$ ]]; then
    sed -n '2,/^set/s/^# \?//p' "$0"
    exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3} failed=()
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
"$python" -c "from benchmarks.measure import commit; commit()" || exit 2 # before minutes of a GPU are spent

run() { # LOG SECONDS COMMAND...: at most so long; prints the end of the output
    echo "== $1"
    # Not through a pipe: a process that outlives its parent would hold it open.
    timeout -k 5 $(($2 * ${PATIENCE:-1})) "${@:3}" >> "$out/$1.txt" 2>&1 || failed+=("$1: status $?")
    tail -n 25 "$out/$1.txt"
    tar -czf "$out.part" -C "$(dirname "$out")" "$(basename "$out")" && mv "$out.part" "$out.tar.gz"
}

suite() { # SECONDS LAST NAME OPTION...: starts no case in the LAST seconds, so that none is cut off
    # shellcheck disable=SC2086  # OPTIONS is a list of words
    run "$3" "$1" "$python" -m benchmarks "$3" --out "$out" --limit $((($1 - $2) * ${PATIENCE:-1})) "${@:4}" ${OPTIONS:-}
}

tests() { # LOG SECONDS FILTER
    run "$1" "$2" "$python" -m pytest tests/test_gpu.py -k "$3" -v --no-header -rfEs -o addopts=--import-mode=importlib
}

! command -v nvidia-smi > /dev/null || run device 10 nvidia-smi
tests races 60 "race"
run selftest 70 "$python" -m densecl_ops.selftest --json "$out/selftest.json"
if [[ $2 == first ]]; then
    suite 120 40 loss --size 12544 65536 128
    suite 80 30 loss --size 1568 65536 128 --dtypes bfloat16 --modes train
    suite 80 30 matching
else
    suite 60 30 loss --size 12544 65536 128 --again
    tests tests 40 "not race"
fi
printf '%s\n' "${failed[@]+"${failed[@]}"}"
((${#failed[@]} == 0))
