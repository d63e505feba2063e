# `make` alone lists the targets. Every target first makes the environment it needs, once.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
KERNELS := $(VENV)/.kernels
TORCHAO := $(VENV)/torchao
# The oldest transformers that pyproject.toml admits, and an environment with it; else pinned as the other one.
OLDEST_TRANSFORMERS := $(shell sed -n 's/.*"transformers>=\([0-9.]*\).*/\1/p' pyproject.toml).0
OLDEST_VENV ?= .venv-oldest
# Tests that one version's run is enough for: they know nothing of transformers, or what other files test with it.
ONCE := benchmarks causal_conv custom_ops digits_data docs evaluation fused_scan geneval image_quality import_arrows \
	latent_cache lm_eval_adapter memory noise_schedule pixels_to_pictures scan_switch score_entropy ssd ssd_kernels \
	training_data_mix training_data_readers training_data_records visual_questions transfusion_baseline
# gradio takes no pillow of 13: the pages are tested in an environment of their own, which sees all else of the first.
SPACE_VENV ?= .venv-space
SITE := import sysconfig; print(sysconfig.get_paths()["purelib"])
# The version that the interpreter test was made with; where torch brings a triton of its own, leave it empty.
TRITON ?= triton==3.7.1

# Tests that run at the same time, each on one thread.
JOBS ?= 2

# More threads than cores cost up to ten times the run time: set OMP_NUM_THREADS to change this.
export OMP_NUM_THREADS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup kernels demo test test-space test-oldest lint bench docs

help:
	@echo "make setup   install the package and its pinned tools into $(VENV) (a few minutes, once)"
	@echo "make kernels add mamba-ssm's Triton kernels (Linux); without a GPU they only serve the tests"
	@echo "make demo    generate images and captions with the shipped weights"
	@echo "make test    ruff, mypy and the tests: what continuous integration runs"
	@echo "make test-space  the tests of mdm serve, with gradio and, where it is or can be had, a browser"
	@echo "make test-oldest  the tests once more, in an environment of their own, under the oldest transformers supported"
	@echo "make lint    mend what ruff can mend, format, check types"
	@echo "make docs    the documentation as a site in build/site; any warning, of a broken link say, stops it"
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

# In a folder of its own, which the tests add to their path: beside a CPU's torch it complains wherever it is imported.
$(TORCHAO): $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps --upgrade --target $@ torchao
	@touch $@

demo: $(INSTALLED)
	$(BIN)/mdm demo

test: $(INSTALLED) $(TORCHAO)
	@$(MAKE) --no-print-directory kernels || echo "No kernel packages for this machine: their test will be skipped." >&2
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --durations=10

test-space: $(SPACE_VENV)/.installed
	OMP_NUM_THREADS=1 $(SPACE_VENV)/bin/python -m pytest -q -rs modeling_tests/test_space.py
	OMP_NUM_THREADS=1 $(SPACE_VENV)/bin/python -m pytest -q modeling_tests/test_docs.py -k publishing.space

$(SPACE_VENV)/.installed: $(INSTALLED)
	$(PYTHON) -m venv $(SPACE_VENV)
	{ $(BIN)/python -c '$(SITE)'; echo $(CURDIR)/src; } > "$$($(SPACE_VENV)/bin/python -c '$(SITE)')/beside.pth"
	{ grep -v '^pillow==' constraints.txt; echo pillow==12.3.0; } > $(SPACE_VENV)/constraints.txt
	$(SPACE_VENV)/bin/python -m pip install --quiet -c $(SPACE_VENV)/constraints.txt gradio selenium
	@command -v chromedriver >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -q && \
		DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends chromium chromium-driver; } \
		>/dev/null 2>&1 || echo "No browser on this machine: what needs one will be skipped." >&2
	@touch $@

test-oldest: $(OLDEST_VENV)/.installed
	OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/python -m pytest -q -n $(JOBS) --dist loadfile --durations=10 \
		$(ONCE:%=--ignore=modeling_tests/test_%.py) -k "not examples_run and not killed_at_any_moment"

# Which huggingface-hub it needs, transformers itself says.
$(OLDEST_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST_VENV)
	grep -vE '^(transformers|huggingface-hub)==' constraints.txt > $(OLDEST_VENV)/constraints.txt
	echo "transformers==$(OLDEST_TRANSFORMERS)" >> $(OLDEST_VENV)/constraints.txt
	$(OLDEST_VENV)/bin/python -m pip install --quiet -c $(OLDEST_VENV)/constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python -m properdocs build -f properdocs.yml
	@echo "Open build/site/index.html; to search: $(BIN)/python -m http.server -d build/site"

bench: $(INSTALLED)
	@set -- benchmarks/[!_]*.py; \
	if [ ! -e "$$1" ]; then \
		echo "Got no benchmarks/*.py; need at least one script that takes --small; write one first" >&2; exit 1; \
	fi; \
	for script in "$$@"; do \
		plot=docs/images/small/$$(basename "$$script" .py).png; \
		echo "== $$script --small --plot $$plot"; $(BIN)/python "$$script" --small --plot "$$plot" || exit 1; \
	done
