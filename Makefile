# Every target sets up what it needs in $(VENV). Start with `make demo` or `make test`.
#
#   PYTHON=python3.12   the interpreter that the environment is made with (3.11 or later: the
#                       pinned versions in requirements/ need it; the package itself runs on 3.10)
#   JOBS=4              processes that share the tests
#   ARGS="-k dora -x"   handed to pytest
#   PIP_FLAGS=...       handed to pip, e.g. an index with CPU-only builds of torch

PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
ARGS ?=
PIP_FLAGS ?=

bin := $(VENV)/bin
stamp := $(VENV)/.lorasmith-installed
locks := requirements/dev.lock requirements/no-deps.lock
pip := $(bin)/python -m pip --disable-pip-version-check --no-input
# Models and data come from installed packages and the local cache; nothing asks a hub.
offline := HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format bench lock hooks build clean
.DELETE_ON_ERROR:

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(stamp) ## Make the environment in .venv with the pinned versions

$(stamp): pyproject.toml $(locks)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is older than 3.11, which requirements/dev.lock needs." \
	       "To fix: make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(pip) install --quiet --progress-bar off $(PIP_FLAGS) -r requirements/dev.lock
	$(pip) install --quiet --progress-bar off $(PIP_FLAGS) --no-deps -r requirements/no-deps.lock
	$(pip) install --quiet --no-build-isolation --no-deps -e .
	@touch $@

demo: $(stamp) ## Fine-tune a real language model and write OUT/report.html (minutes, offline)
	$(offline) $(bin)/lorasmith demo -o $(OUT)
	@echo "Report: $(abspath $(OUT))/report.html"

# One thread for each process: two processes on two cores beat one process with two threads.
test: $(stamp) ## Run every test
	$(offline) OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
	  $(bin)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(stamp) ## ruff, the formatter's check, and mypy --strict
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy --strict

format: $(stamp) ## Rewrite the code as ruff likes it
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

bench: $(stamp) ## Run every benchmark in benchmarks/
	@set -e; found=0; for file in benchmarks/*.py; do \
	  case "$$file" in *"*"*|*/_*|*/__init__.py) continue;; esac; \
	  found=1; echo "== $$file"; $(offline) $(bin)/python "$$file" $(ARGS); \
	done; test $$found = 1 || { echo "no benchmark in benchmarks/" >&2; exit 1; }

lock: $(stamp) ## Write requirements/dev.lock anew from what .venv holds
	$(bin)/python requirements/freeze.py > requirements/dev.lock.new
	mv requirements/dev.lock.new requirements/dev.lock

hooks: $(stamp) ## Run ruff and mypy before every commit
	$(bin)/pre-commit install

build: $(stamp) ## Build the wheel and the source archive in dist/
	$(bin)/hatchling build

clean: ## Remove what was built, cached and written by runs (keeps .venv)
	rm -rf build dist runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
