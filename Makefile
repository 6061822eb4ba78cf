# What a person types: `make demo`, `make test`, `make lint`. The first of them makes .venv, once.
#
#   make demo ARGS="--steps 50"
#   make test ARGS="tests/test_data.py -k digits"
#   make test PYTHON=python3.13

PYTHON ?= python3
ARGS ?=

ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test lint clean

demo: .venv/ready
	@$(BIN)/python -m labkit demo $(ARGS)

test: .venv/ready
	@$(BIN)/python -m pytest $(ARGS)

lint: .venv/ready
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Written last, so that an installation broken off half-way is begun again. Made anew, not upgraded, when the
# requirements change: what is no longer required must not linger.
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "labkit needs Python 3.11 or newer, and \"$(PYTHON)\" is not that: $$($(PYTHON) --version 2>&1)."; \
	    echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "This Python cannot make virtual environments: its venv module or ensurepip is missing."; \
	    echo "On Debian or Ubuntu it is a package of its own: python3-venv (or python3.12-venv and the like)."; exit 1; }
	@echo "Installing labkit and what it needs into .venv (some minutes, once) ..."
	@rm -rf .venv && $(PYTHON) -m venv .venv
	@$(PIP) install --quiet --constraint constraints.txt --editable ".[dev,notebooks]"
	@touch $@
