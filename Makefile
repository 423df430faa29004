# Polyrank: everything a checkout can do. Needs Python 3.11 or newer with pip, and make. `make` alone lists it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
INPUTS := pyproject.toml constraints-dev.txt

# the PEFT bridge is tested against the oldest PEFT that is supported and the newest, each with a transformers of its time
OLD_PEFT := peft==0.18.1 transformers==5.0.0
NEW_PEFT := peft transformers
MEET     := $(CURDIR)/.venv-peft-new/meet

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test slow test-peft test-trainer lint bench format cards docs build clean

help: ## this list
	@echo "Polyrank. The targets set up $(VENV) by themselves; start with 'make quickstart'."
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "One test file: $(BIN)/pytest tests/test_architecture.py    Another Python: make PYTHON=python3.12 setup"

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No python3.11 or python3 found: install Python 3.11, or run make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: install 3.11, or run make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

# torch comes first and pinned, so that nothing else decides its version
$(VENV)/.use: $(INPUTS) | $(BIN)/python
	@echo "installing polyrank[all] into $(VENV) (once; torch is large)"
	@$(PIP) install -c constraints-dev.txt torch
	@$(PIP) install -c constraints-dev.txt -e '.[all]'
	@touch $@

$(VENV)/.dev: $(VENV)/.use
	@echo "installing the development tools into $(VENV)"
	@$(PIP) install -c constraints-dev.txt -e '.[all,dev,docs]'
	@touch $@

setup: $(VENV)/.dev ## create .venv with everything for development

quickstart: $(VENV)/.use ## adapt a small model to six tasks and show the result
	@$(BIN)/polyrank quickstart

test: $(VENV)/.dev ## the tests that every change must pass
	@OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto

slow: $(VENV)/.dev ## the heavy checks
	@$(BIN)/pytest -q -m slow

.venv-peft-old/.use: PEFTS = $(OLD_PEFT)
.venv-peft-new/.use: PEFTS = $(NEW_PEFT)
.venv-peft-old/.use .venv-peft-new/.use: $(INPUTS)
	@echo "installing $(PEFTS) into $(@D) (once; torch is large)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip --disable-pip-version-check --quiet install -c constraints-dev.txt torch
	@$(@D)/bin/python -m pip --disable-pip-version-check --quiet install -c constraints-dev.txt -e '.[peft]' $(PEFTS) 'pytest>=8.3,<10'
	@touch $@

test-peft: .venv-peft-old/.use .venv-peft-new/.use ## the PEFT bridge with the oldest and the newest PEFT, in environments of their own
	@rm -rf $(MEET) && mkdir $(MEET)
	@POLYRANK_PEFT_EXCHANGE=$(MEET) OMP_NUM_THREADS=1 .venv-peft-old/bin/pytest -q -m '' tests/peft_bridge
	@POLYRANK_PEFT_EXCHANGE=$(MEET) OMP_NUM_THREADS=1 .venv-peft-new/bin/pytest -q -m '' tests/peft_bridge
	@POLYRANK_PEFT_EXCHANGE=$(MEET) OMP_NUM_THREADS=1 .venv-peft-old/bin/pytest -q -k versions tests/peft_bridge

.venv-trainer/.use: $(INPUTS)
	@echo "installing TRL and lm-eval into $(@D) (once; torch is large)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip --disable-pip-version-check --quiet install -c constraints-dev.txt torch
	@$(@D)/bin/python -m pip --disable-pip-version-check --quiet install -c constraints-dev.txt -e '.[all,peft,trl,lm-eval]' 'pytest>=8.3,<10' 'hypothesis>=6.112,<7'
	@touch $@

test-trainer: .venv-trainer/.use ## the Trainer bridge inside TRL, and lm-eval, in an environment of their own
	@OMP_NUM_THREADS=1 .venv-trainer/bin/pytest -q tests/test_trl.py tests/test_lm_eval.py

lint: $(VENV)/.dev ## ruff (rules and format) and pyright
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright

bench: $(VENV)/.dev ## the speed suite beside PEFT, into docs/results (half an hour on one core; ARGS=--quick for a look)
	@$(PIP) install -c constraints-dev.txt -e '.[all,bench]'
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.speed docs/results $(ARGS)

format: $(VENV)/.dev ## let ruff mend what it can
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

cards: $(VENV)/.dev ## docs/methods/*.md, from the code
	@$(BIN)/python -m polyrank.cards docs

docs: $(VENV)/.dev ## the documentation, as pages in site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html, or with search: $(BIN)/mkdocs serve"

build: $(VENV)/.dev ## wheel and sdist into dist/
	@$(BIN)/python -m build

clean: ## remove .venv and everything that was built (the download cache stays)
	@rm -rf $(VENV) .venv-peft-old .venv-peft-new .venv-trainer dist build site .pytest_cache .ruff_cache .hypothesis
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
