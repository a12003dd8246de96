#!/usr/bin/env bash
# What a machine with a GPU should run: correctness on the device, memory checker, speed.
#
#   benchmarks/gpu_run.sh FOLDER STAGE...
#
# All of it in three calls of nine minutes, in order of worth. The last stage of a call takes the time that is left, so
# that a shorter call (LIMIT=300) loses only that:
#   benchmarks/gpu_run.sh runs/gpu selftest tests headline tune sanitize
#   benchmarks/gpu_run.sh runs/gpu sanitize matching queue step loss
#   benchmarks/gpu_run.sh runs/gpu transfer loss
# After a change of the table of tiles, instead of the third:
#   benchmarks/gpu_run.sh runs/gpu tests again loss
#
# Every stage has a limit of its own, and the next one runs even if it fails. A suite goes on where its file in FOLDER
# ends, so keep FOLDER. In it: the JSON of selftest and of five suites, transfer.tar.gz, and logs.tar.gz, renewed after
# every stage. Variables:
#   PYTHON    the interpreter: with torch and torchvision for this GPU, triton, einops, numpy, pytest, pytest-timeout,
#             pytest-xdist and hypothesis; for the transfer suite pillow and scikit-image too
#   COMMIT    what is measured, where there is no .git: COMMIT=$(git describe --always --dirty --exclude='*')
#   TRANSFER  options of the transfer suite: where its data are, and those of docs/dense-tasks.md
#   LIMIT     seconds of a call (540)
#   OPTIONS   of all suites, and PATIENCE, a factor on every limit: for a rehearsal on a slow machine without a GPU,
#             TRITON_INTERPRET=1 OPTIONS="--toy --device cpu --seconds 0.01" PATIENCE=10
set -uo pipefail
if (($# < 2)); then
    sed -n '2,/^set/s/^# \?//p' "$0"
    exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.." || exit
if [[ -z ${COMMIT:-} ]] && ! git rev-parse HEAD > /dev/null 2>&1; then
    echo "no record without its commit, and there is no .git here: set COMMIT"
    exit 2
fi
python=${PYTHON:-python3} options=${OPTIONS:-} patience=${PATIENCE:-1} failed=()
end=$((${LIMIT:-540} * patience))
export PATH=$PATH:/usr/local/cuda/bin PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
logs=$(mktemp -d)
trap 'rm -r "$logs"' EXIT
[[ ! -f $out/logs.tar.gz ]] || tar -xzf "$out/logs.tar.gz" -C "$logs"

keep() { # NAME TAR-ARGUMENT...: as $out/NAME.tar.gz, whole or not at all
    tar -czf "$out/$1.part" "${@:2}" && mv "$out/$1.part" "$out/$1.tar.gz"
}

run() { # LOG SECONDS COMMAND...: at most so long, and never beyond the call; prints the end of the output
    local log=$1 limit=$(($2 * patience)) status=0
    ((limit <= end - SECONDS)) || limit=$((end - SECONDS))
    if ((limit <= 0)); then
        failed+=("$log: no time left")
        return 1
    fi
    # Not through a pipe: a process that outlives its parent would hold it open.
    timeout -k 5 "$limit" "${@:3}" >> "$logs/$log.txt" 2>&1 || status=$?
    tail -n 40 "$logs/$log.txt"
    ((status == 0)) || failed+=("$log: status $status")
    keep logs -C "$logs" .
    return "$status"
}

suite() { # NAME SECONDS LAST OPTION...: starts no case in the LAST seconds, so that none is cut off
    local limit=$(($2 * patience)) last=$(($3 * patience))
    ((limit <= end - SECONDS)) || limit=$((end - SECONDS))
    if ((limit <= last)); then
        failed+=("$1: no time left")
        return
    fi
    # shellcheck disable=SC2086  # OPTIONS is a list of words
    run "$1" "$2" "$python" -m benchmarks "$1" --out "$out" --limit $((limit - last)) "${@:4}" $options
}

stage() {
    case $1 in
        selftest) run selftest 80 "$python" -m densecl_ops.selftest --json "$out/selftest.json" ;;
        tests) # A test that hangs costs one worker; and what is not begun in time is left out, to report on the rest.
            run tests 160 "$python" -m pytest tests/test_triton.py tests/test_gpu.py -n 8 -v --no-header -rfEs \
                -o addopts=--import-mode=importlib --timeout $((75 * patience)) --timeout-method thread \
                --session-timeout $((110 * patience)) ;;
        sanitize) # once plainly: the checked runs shall find every kernel compiled
            local kernels='(prepare|attend|combine|grad_negatives|grad_key|match|inverse_norm)_kernel' # and none of torch's
            run sanitize 60 "$python" -m benchmarks.sanitize && for tool in memcheck racecheck; do
                # With torch's caching allocator every block is part of a larger one, and no access is out of bounds.
                run "$tool" 40 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
                    --error-exitcode 1 --kernel-regex "kns=$kernels" "$python" -m benchmarks.sanitize
            done ;;
        headline) suite loss 140 40 --n 12544 ;;
        loss) suite loss 300 45 ;;
        matching) suite matching 150 30 ;;
        queue) suite queue 50 20 ;;
        step) suite step 180 75 ;;
        tune) suite tune 90 40 ;;
        transfer) # Its folder holds too many files. On a machine that is kept, a run cut off goes on from its checkpoint.
            [[ ! -f $out/transfer.tar.gz ]] || tar -xzf "$out/transfer.tar.gz"
            mkdir -p runs/gpu-transfer
            # shellcheck disable=SC2086  # TRANSFER is a list of words
            run transfer 240 "$python" -m benchmarks transfer --out runs/gpu-transfer ${TRANSFER:-}
            keep transfer --exclude scratch runs/gpu-transfer ;;
        again)
            suite loss 140 40 --n 12544 --again
            suite step 180 75 --again ;;
        *) failed+=("$1: no such stage") ;;
    esac
}

! command -v nvidia-smi > /dev/null || run device 10 nvidia-smi
for name; do
    echo "== $name"
    stage "$name"
done
printf '%s\n' "${failed[@]+"${failed[@]}"}"
((${#failed[@]} == 0))
