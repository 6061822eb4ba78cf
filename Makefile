# What a person types: `make demo`, `make lab`, `make test`, `make lint`. The first of them makes .venv, once.
#
#   make demo ARGS="--watch"
#   make test ARGS="tests/test_datasets.py -k digits"
#   make test PYTHON=python3.13
#
# For who changes the dashboard: `make frontend` bundles its pages anew (Node.js), `make test-browser` opens them. For who
# changes how hosts reach each other: `make test-network`.

PYTHON ?= python3
ARGS ?=

ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif
PIP := $(BIN)/python -m pip --disable-pip-version-check

FRONTEND := labkit/view/frontend
STATIC := labkit/view/static
CHROMIUM ?= /usr/bin/chromium
export CHROMIUM
# Hundreds of Python processes would compile labkit anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo lab test test-browser test-network lint frontend frontend-check clean

# An environment cannot be moved: its programs, and its link to this checkout, are absolute paths. That of a checkout which
# was copied or moved is made anew.
HERE = from importlib.util import find_spec; from os import path; \
    print(path.samefile("labkit", path.dirname(find_spec("labkit").origin)))
ifneq ($(wildcard .venv/ready),)
ifneq ($(shell $(BIN)/python -I -c '$(HERE)' 2>/dev/null),True)
.PHONY: .venv/ready
endif
endif

demo: .venv/ready
	@$(BIN)/python -m labkit demo $(ARGS)

lab: .venv/lab-ready
	@$(BIN)/python -m jupyterlab --LabApp.default_url=/lab/tree/tutorials/01_first_swarm.ipynb $(ARGS)

# Three files at a time, for two cores, since tests wait now and then: torch's threads are not to spin meanwhile. Which
# come first says `tests/conftest.py`.
test: .venv/ready .venv-colab/ready
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)

test-browser: .venv/browser-ready
	@test -x "$(CHROMIUM)" || { \
	    echo "There is no chromium at $(CHROMIUM). On Debian: apt-get install chromium"; \
	    echo "Elsewhere name the one that is there: make test-browser CHROMIUM=/path/to/chrome"; exit 1; }
	@$(BIN)/python -m pytest $(or $(ARGS),tests/browser)

# Hosts, routers, firewalls and clusters in a network of their own: Linux, iproute2 and nftables.
test-network: .venv/ready .venv-colab/ready
	@$(BIN)/python -m tests.network.within $(BIN)/python -m pytest $(or $(ARGS),tests/network)

lint: .venv/ready
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy

# The bundles are committed, so that nobody needs Node.js to use them.
frontend:
	@command -v npm >/dev/null || { echo "The front end is bundled by Node.js 20.19 or newer and its npm."; exit 1; }
	@cd $(FRONTEND) && npm ci --no-audit --no-fund && npm run --silent check && npm test --silent && npm run --silent build

frontend-check: frontend
	@changed="$$(git status --porcelain -- $(STATIC))" && test -z "$$changed" || { \
	    echo "$$changed"; git --no-pager diff --stat -- $(STATIC); \
	    echo "The committed bundles are not what $(FRONTEND) gives: commit what \`make frontend\` wrote."; exit 1; }

clean:
	rm -rf .venv .venv-colab build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf $(FRONTEND)/node_modules tests/browser/shots
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
	@$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

# What Colab has, for one test: a second, small environment, which borrows the rest from .venv.
.venv-colab/ready: .venv/ready tests/colab_environment.py
	@$(BIN)/python -m tests.colab_environment .venv-colab
	@touch $@

.venv/lab-ready: .venv/ready
	@echo "Installing JupyterLab into .venv (once) ..."
	@$(PIP) install --quiet --constraint constraints.txt --editable ".[lab]"
	@touch $@

.venv/browser-ready: .venv/ready
	@echo "Installing JupyterLab and Playwright into .venv (once) ..."
	@$(PIP) install --quiet --constraint constraints.txt --editable ".[browser]"
	@touch $@
