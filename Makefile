# One environment for everything below. torch is pinned and installed first: the wheel that pip would otherwise choose
# may be another one than the tests were run with. Users of the package are bound by the floors in pyproject.toml only.
PYTHON ?= python3
VENV := .venv
TORCH := torch==2.13.0
TRITON := triton==3.7.1
BIN := $(VENV)/bin
PACKAGE_TESTS := tests/test_package.py tests/test_head.py tests/test_queue.py tests/test_metrics.py
TORCH_INTO ?= $(1)/bin/pip install --quiet $(TORCH)

.PHONY: demo test quick execute semantics test-gpu lint package kernels bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     train on real photographs, measure dense matches, draw the picture (runs/demo/)"
	@echo "make test     run every test"
	@echo "make quick    run the tests that take seconds: every module once, under two minutes on two cores"
	@echo "make lint     ruff and mypy"
	@echo "make docs     build the site, warnings are errors (build/docs/index.html)"
	@echo "make package  build sdist and wheel, check both, run the sdist's tests on the wheel in a clean environment"
	@echo "make execute  run the GPU kernels' machine code for sm_80 and sm_90 on the CPU, instruction by instruction (g++)"
	@echo "make semantics  run the kernels' TTIR on the CPU: overruns, races between programs (PYTHON: 3.12 or 3.13)"
	@echo "make test-gpu run the tests that need a GPU (PYTHON: an interpreter with torch for it)"
	@echo "make kernels  compile every Triton kernel for eleven GPUs: registers, spills, shared memory, instructions"
	@echo "make bench    measure loss, matching, queue and step on this machine (runs/bench/)"

$(VENV)/installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(call TORCH_INTO,$(VENV))
	$(BIN)/pip install --quiet $(TRITON)
	$(BIN)/pip install --quiet --editable ".[demo,dev]"
	# Hosts of two recipes, without the torchvision they require: no build of it matches this torch. Tests stub it.
	$(BIN)/pip install --quiet --no-deps byol-pytorch==0.9.1 lightly==1.6.0
	touch $@

demo: $(VENV)/installed
	$(BIN)/python docs/examples/pretrain.py --overwrite

test: $(VENV)/installed
	$(BIN)/python -m pytest

quick: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow" --hypothesis-profile quick

execute: $(VENV)/installed
	for target in 80 90; do \
		PTX_TARGET=$$target $(BIN)/python -m pytest -q -n 2 tests/test_triton.py tests/ptx || exit 1; \
	done

# In an environment of its own: ttsem runs Triton 3.8.0 alone. PYTHON: 3.12 or 3.13.
semantics: TORCH = torch==2.14.0
semantics:
	$(PYTHON) -m venv build/semantics
	$(call TORCH_INTO,build/semantics)
	build/semantics/bin/pip install --quiet ttsem==0.1.0 triton==3.8.0 --editable ".[test]"
	build/semantics/bin/python -m ttsem.sanitize pytest -q tests/test_triton.py -k "not compiled" # these want a driver

test-gpu: # in the interpreter that has torch for the GPU, not in .venv, whose torch may be a CPU build
	PYTHON=$(PYTHON) benchmarks/gpu_run.sh runs/gpu first
	PYTHON=$(PYTHON) benchmarks/gpu_run.sh runs/gpu second

lint: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.PHONY: docs
docs: $(VENV)/installed
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env docs build/docs

# The wheel is built from the sdist. Its tests are those of the sdist, in an environment of its own.
package: $(VENV)/installed
	rm -rf dist build/clean build/sdist
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	$(PYTHON) -m venv build/clean
	$(call TORCH_INTO,build/clean)
	build/clean/bin/pip install --quiet "$$(echo dist/*.whl)[test]"
	mkdir build/sdist && tar -xzf dist/*.tar.gz -C build/sdist --strip-components 1 && rm -r build/sdist/densecl_ops
	cd build/sdist && ../clean/bin/pytest -q $(PACKAGE_TESTS)
	cd build/sdist && ../clean/bin/pytest -q -p no:cacheprovider --pyargs densecl_ops

kernels: $(VENV)/installed
	$(BIN)/python -m benchmarks kernels

bench: $(VENV)/installed
	for suite in loss matching queue step; do $(BIN)/python -m benchmarks $$suite || exit 1; done

clean:
	rm -rf $(VENV) dist build runs
