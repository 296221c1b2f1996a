# `make demo` and `make test` set everything up by themselves, the first time in some minutes; `make help` lists the rest.
# Variables: PYTHON (the interpreter of the virtual environment), CXX, MAX_JOBS, FIF_OPS_CUDA_ARCHS, ARGS (handed to the
# program that is run).

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --disable-pip-version-check --constraint constraints.txt
SOURCES := setup.py $(shell find csrc -type f)
READY := $(VENV)/.ready
LINTERS := $(VENV)/.linters
PEERS := $(VENV)/.peers
LIBRARY := fif_ops/_C.so
SANITIZED := build/sanitize/_C.so

# Builds for this machine: the architectures of its GPUs, or one, so that the kernels are compiled and checked at all.
export FIF_OPS_CUDA_ARCHS ?= $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u),90)

.DEFAULT_GOAL := help
.PHONY: help demo test bench bench-cpu gpu sanitize registers lint format wheel clean distclean compiler

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(LIBRARY)  ## train and compare a network with the reference and the fused unit
	$(PY) -m fif_ops demo $(ARGS)

test: compiler $(LIBRARY) $(SANITIZED)  ## all tests, the sanitized kernels included
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n 2 $(ARGS)

bench: $(LIBRARY)  ## all benchmarks; keep the machine idle meanwhile
	$(PY) -m pytest benchmarks --benchmark-only $(ARGS)

bench-cpu: $(LIBRARY) $(PEERS)  ## the README's figures of speed, against other runtimes, in 20 minutes; keep the machine idle
	$(PY) -m benchmarks.cpu $(ARGS)
	$(PY) -m benchmarks.report benchmarks/results/cpu.json --readme README.md

gpu:  ## tests and benchmarks on the GPU at hand, in 8 minutes; with the torch of PYTHON, and nothing installed
	$(PYTHON) -m benchmarks.gpu $(ARGS)

sanitize: compiler $(LIBRARY) $(SANITIZED)  ## only the tests of the kernels built with address and undefined-behaviour sanitizers
	$(PY) -m pytest -k sanitize $(ARGS)

registers: $(LIBRARY)  ## rewrite the table of the CUDA kernels' registers and occupancy; needs nvcc
	$(PY) tests/cuda_static.py --write

lint: $(LINTERS)  ## ruff, mypy, clang-format: report
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs -r $(VENV)/bin/clang-format --dry-run --Werror

format: $(LINTERS)  ## ruff, clang-format: repair
	$(PY) -m ruff check --fix
	$(PY) -m ruff format
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs -r $(VENV)/bin/clang-format -i

wheel: export FIF_OPS_CUDA_ARCHS =
wheel: $(READY)  ## dist/fif_ops-*.whl, for every Python and every torch from 2.10 on
	$(PY) -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

clean:  ## remove what was built
	rm -rf build dist fif_ops.egg-info fif_ops/_C.so fif_ops/_build_info.json

distclean: clean  ## remove the virtual environment as well
	rm -rf $(VENV)

compiler:
	@for cxx in $${CXX:-c++ g++ clang++}; do command -v "$$cxx" >/dev/null && exit 0; done; \
	echo "No C++ compiler ($${CXX:-c++, g++, clang++}): install g++ 11 or newer (Debian: apt install g++), or set CXX." >&2; exit 1

$(READY): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	{ echo "Python 3.10 or newer is needed, and '$(PYTHON)' is not that: name one with make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	{ echo "'$(PYTHON)' has no venv module: install it (Debian: apt install python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch setuptools ninja
	@touch $@

# Without a compiler the install succeeds and leaves no library: the rule then runs again next time.
$(LIBRARY): $(READY) $(SOURCES) pyproject.toml
	@echo "Building the kernels and installing the package into $(VENV) ..."
	$(INSTALL) --quiet --no-build-isolation --editable '.[test,demo]'
	@touch -c $@

$(PEERS): pyproject.toml constraints.txt | $(LIBRARY)
	$(INSTALL) --quiet --no-build-isolation --editable '.[test,demo,peers]'
	@touch $@

$(SANITIZED): $(READY) $(SOURCES)
	$(PY) setup.py --quiet build_sanitized || \
	{ echo "The sanitized kernels did not build, see above. A missing libasan or libubsan comes with the compiler's packages." >&2; exit 1; }
	@touch -c $@

$(LINTERS): $(READY)
	$(INSTALL) --quiet clang-format mypy ruff
	@touch $@
