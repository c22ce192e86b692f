# make demo: set up and run the example.  make test: set up and run every test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.PHONY: setup demo test ctest sanitize interpret pytest lint clean

setup: $(VENV)/.installed

KERNELS := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.inl csrc/cpu/*.cpp csrc/cuda/*)

# Runs again only when one of these changes; Python files are used in place. torch comes first and by its exact
# version: a package that asks for any torch would take the newest. The extension is built with it, last.
$(VENV)/.installed: Makefile pyproject.toml requirements-dev.txt setup.py $(KERNELS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install torch==2.13.0 -c requirements-dev.txt
	$(BIN)/pip install setuptools -c requirements-dev.txt
	$(BIN)/pip install --no-build-isolation -e '.[dev]' -c requirements-dev.txt
	$(BIN)/resmoe env
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

test: ctest interpret pytest

# One GPU target where there is nvcc: the extension has been compiled for all of them.
ctest: setup
	$(BIN)/cmake -S . -B build/cmake -DCMAKE_CUDA_ARCHITECTURES=80
	$(BIN)/cmake --build build/cmake --parallel 2
	$(BIN)/ctest --test-dir build/cmake --output-on-failure --parallel 2

# The C++ tests again, with every read out of bounds and every undefined operation an error; then those with threads,
# with every race an error.
sanitize: setup
	$(BIN)/cmake -S . -B build/sanitize -DRESMOE_SANITIZE=address,undefined
	$(BIN)/cmake --build build/sanitize --parallel 2
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure --parallel 2
	$(BIN)/cmake -S . -B build/races -DRESMOE_SANITIZE=thread
	$(BIN)/cmake --build build/races --parallel 2 \
	  --target test_experts test_cuda_emulation test_cuda_emulation_faults test_low_rank_decode
	$(BIN)/ctest --test-dir build/races --output-on-failure --parallel 2 \
	  -R '^(experts|cuda_emulation.*|low_rank_decode)$$'

# The Triton kernels on the CPU, by Triton's interpreter: it is chosen when kernels are imported, so in a process of its
# own.
interpret: setup
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n auto tests/kernels/test_experts.py tests/triton_kernels

# One thread each: with two, busy cores make OpenMP wait on itself (72 tests took 56 s instead of 7 s).
pytest: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist demo-out *.egg-info resmoe_kernels/_C*.so
