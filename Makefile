# `make` alone lists the targets. Every target first makes the environment it needs, once.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
KERNELS := $(VENV)/.kernels
# The version that the interpreter test was made with; where torch brings a triton of its own, leave it empty.
TRITON ?= triton==3.7.1

# More threads than cores cost up to ten times the run time: set OMP_NUM_THREADS to change this.
export OMP_NUM_THREADS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup kernels demo test lint bench

help:
	@echo "make setup   install the package and its pinned tools into $(VENV) (a few minutes, once)"
	@echo "make kernels add mamba-ssm's Triton kernels (Linux); without a GPU they only serve the tests"
	@echo "make demo    generate images and captions with the shipped weights"
	@echo "make test    ruff, mypy and the tests: what continuous integration runs"
	@echo "make lint    mend what ruff can mend, format, check types"
	@echo "make bench   every benchmark at its small size, each ending in one JSON line"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
		echo "Got no '$(PYTHON)'; need Python 3.11 or newer; install it or run: make setup PYTHON=/path/to/python" >&2; \
		exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Got $$($(PYTHON) --version 2>&1); need Python 3.11 or newer; run: make setup PYTHON=/path/to/python" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

kernels: $(KERNELS)

# mamba-ssm as a pure Python wheel: its Triton kernels need no compiler, and --no-deps keeps away what they do not use.
$(KERNELS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt einops packaging setuptools $(TRITON)
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
		$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps --no-build-isolation mamba-ssm
	@touch $@

demo: $(INSTALLED)
	$(BIN)/mdm demo

test: $(INSTALLED)
	@$(MAKE) --no-print-directory kernels || echo "No kernel packages for this machine: their test will be skipped." >&2
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q --durations=10

lint: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

bench: $(INSTALLED)
	@set -- benchmarks/[!_]*.py; \
	if [ ! -e "$$1" ]; then \
		echo "Got no benchmarks/*.py; need at least one script that takes --small; write one first" >&2; exit 1; \
	fi; \
	for script in "$$@"; do \
		plot=docs/images/small/$$(basename "$$script" .py).png; \
		echo "== $$script --small --plot $$plot"; $(BIN)/python "$$script" --small --plot "$$plot" || exit 1; \
	done
