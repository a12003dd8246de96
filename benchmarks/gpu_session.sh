#!/usr/bin/env bash
# Everything a machine with a GPU should run, in order of worth: correctness on the device, memory checker, speed.
# Usage: benchmarks/gpu_session.sh [FOLDER]; logs and JSON go to FOLDER (default: runs/gpu). PYTHON chooses the
# interpreter, which needs torch for this GPU, triton, einops, numpy, pytest, pytest-timeout and hypothesis.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-runs/gpu}" && cd "${1:-runs/gpu}" && pwd)
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

nvidia-smi > "$out/device.txt" 2>&1
"$python" -c "from benchmarks.measure import environment; print(environment())" | tee -a "$out/device.txt"
timeout 420 "$python" -m pytest tests/test_triton.py tests/test_gpu.py -q -rs -o addopts=--import-mode=importlib \
    2>&1 | tee "$out/tests.txt" | tail -n 40
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        timeout 90 compute-sanitizer --tool "$tool" --kernel-regex kns=_kernel \
            "$python" -m benchmarks.sanitize > "$out/$tool.txt" 2>&1
        tail -n 3 "$out/$tool.txt"
    done
fi
# Resumable: a second call with the same folder goes on where --limit stopped the first.
"$python" -m benchmarks loss --out "$out" --limit "${LIMIT:-240}" | tee -a "$out/loss.txt" | tail -n 60
"$python" -m benchmarks matching --out "$out" --limit 60 | tee -a "$out/matching.txt" | tail -n 40
"$python" -m benchmarks queue --out "$out" --limit 30 | tee -a "$out/queue.txt" | tail -n 20
"$python" -m benchmarks step --out "$out" --limit 120 | tee -a "$out/step.txt" | tail -n 40
