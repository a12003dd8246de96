# One environment for everything below. torch is pinned and installed first: the wheel that pip would otherwise choose
# may be another one than the tests were run with. Users of the package are bound by the floors in pyproject.toml only.
PYTHON ?= python3
VENV := .venv
TORCH := torch==2.13.0
TRITON := triton==3.7.1
BIN := $(VENV)/bin

.PHONY: demo test test-gpu lint package kernels bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     train on real photographs, measure dense matches, draw the picture (runs/demo/)"
	@echo "make test     run every test"
	@echo "make lint     ruff and mypy"
	@echo "make package  build wheel and sdist, import the wheel in a clean environment"
	@echo "make test-gpu run the tests that need a GPU (PYTHON: an interpreter with torch for it)"
	@echo "make kernels  compile every Triton kernel for eleven GPUs: registers, spills, shared memory, instructions"
	@echo "make bench    measure loss, matching, queue and step on this machine (runs/bench/)"

$(VENV)/installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH) $(TRITON)
	$(BIN)/pip install --quiet --editable ".[demo,dev]"
	# Hosts of two recipes, without the torchvision they require: no build of it matches this torch. Tests stub it.
	$(BIN)/pip install --quiet --no-deps byol-pytorch==0.9.1 lightly==1.6.0
	touch $@

demo: $(VENV)/installed
	$(BIN)/python docs/examples/pretrain.py

test: $(VENV)/installed
	$(BIN)/python -m pytest

test-gpu: # in the interpreter that has torch for the GPU, not in .venv, whose torch may be a CPU build
	PYTHON=$(PYTHON) benchmarks/gpu_session.sh

lint: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

package: $(VENV)/installed
	rm -rf dist build/clean
	$(BIN)/python -m build --quiet
	$(PYTHON) -m venv build/clean
	build/clean/bin/pip install --quiet $(TORCH) $(TRITON)
	build/clean/bin/pip install --quiet dist/*.whl
	cd build && clean/bin/python -c "import densecl_ops; print('wheel imports:', densecl_ops.__version__, densecl_ops.__all__)"

kernels: $(VENV)/installed
	$(BIN)/python -m benchmarks kernels

bench: $(VENV)/installed
	for suite in loss matching queue step; do $(BIN)/python -m benchmarks $$suite || exit 1; done

clean:
	rm -rf $(VENV) dist build runs
