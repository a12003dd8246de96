#!/usr/bin/env bash
# What a machine with a GPU should run: correctness on the device, memory checker, speed.
#
#   benchmarks/gpu_run.sh FOLDER STAGE...
#
# Three calls of under ten minutes each, in order of worth:
#   benchmarks/gpu_run.sh runs/gpu tests headline sanitize
#   benchmarks/gpu_run.sh runs/gpu matching queue step tune
#   benchmarks/gpu_run.sh runs/gpu loss transfer    # or, after a change of the table of tiles: again
#
# Every stage has a limit of its own, the next one runs even if it fails, and a suite goes on where its file in FOLDER
# ends. FOLDER receives a JSON per suite and logs.tar.gz, renewed after every stage. Variables: PYTHON, the interpreter
# (with torch for this GPU, triton, einops, numpy, pytest, pytest-timeout, pytest-xdist and hypothesis); COMMIT, what is
# measured, where .git did not travel along: COMMIT=$(git describe --always --dirty --exclude='*'); OPTIONS, of all
# suites (a rehearsal: "--toy --device cpu"); GRACE, seconds that a suite's last case may take beyond its limit (60);
# TRANSFER, of the transfer suite: where its data are, and the options of docs/dense-tasks.md.
set -uo pipefail
if (($# < 2)); then
    sed -n '2,/^set/s/^# \?//p' "$0"
    exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3} options=${OPTIONS:-} failed=()
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
logs=$(mktemp -d)
trap 'rm -r "$logs"' EXIT
[[ ! -f $out/logs.tar.gz ]] || tar -xzf "$out/logs.tar.gz" -C "$logs"

run() { # LOG SECONDS COMMAND...: the whole output goes to the archive, its end to the terminal
    local log=$1 limit=$2
    shift 2
    timeout -k 5 "$limit" "$@" 2>&1 | tee -a "$logs/$log.txt" | tail -n 40
    local status=${PIPESTATUS[0]}
    ((status == 0)) || failed+=("$log: status $status")
    tar -czf "$out/logs.tar.gz" -C "$logs" .
    return "$status"
}

suite() { # NAME SECONDS OPTION...: no case is started after so many seconds, and the last one has GRACE to end
    # shellcheck disable=SC2086  # OPTIONS is a list of words
    run "$1" $(($2 + ${GRACE:-60})) "$python" -m benchmarks "$1" --out "$out" --limit "$2" "${@:3}" $options
}

stage() {
    case $1 in
        tests) run tests 240 "$python" -m pytest tests/test_triton.py tests/test_gpu.py -n 8 -q -rs \
            -o addopts=--import-mode=importlib ;;
        sanitize) # once plainly: the checked runs shall find every kernel compiled
            run sanitize 40 "$python" -m benchmarks.sanitize && for tool in memcheck racecheck; do
                # With torch's caching allocator every block is part of a larger one, and no access is out of bounds.
                run "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
                    --error-exitcode 1 --kernel-regex kns=_kernel "$python" -m benchmarks.sanitize
            done ;;
        headline) suite loss 120 --n 12544 ;;
        loss) suite loss 240 ;;
        matching) suite matching 90 ;;
        queue) suite queue 20 ;;
        step) suite step 150 ;;
        tune) suite tune 60 ;;
        # Stopped at its limit, it goes on in a later call if FOLDER/transfer travels along.
        # shellcheck disable=SC2086
        transfer) run transfer 240 "$python" -m benchmarks transfer --out "$out/transfer" ${TRANSFER:-} ;;
        again) suite loss 120 --n 12544 --again && suite matching 90 --again && suite step 120 --again ;;
        *) failed+=("$1: no such stage") ;;
    esac
}

! command -v nvidia-smi > /dev/null || run device 20 nvidia-smi
for name; do
    echo "== $name"
    stage "$name"
done
printf '%s\n' "${failed[@]+"${failed[@]}"}"
((${#failed[@]} == 0))
