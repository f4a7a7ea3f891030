# Everything runs from .venv, which the first target builds; nothing outside this folder changes.
# PYTHON picks the interpreter (3.11 or newer): make test PYTHON=python3.12
# pip's own settings are kept: on a machine without a GPU, PyPI's torch is not wanted, so
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test slow test-gpu lint docs wheel clean

help:  ## say what there is
	@echo 'rite_diffusion: make TARGET'
	@sed -n 's/^\([a-z-]*\):[^#]*##  *\(.*\)/  \1	\2/p' Makefile

demo: $(VENV)/.installed  ## learn a concept on the embedded model, draw before and after (minutes)
	$(BIN)/rite demo

test: $(VENV)/.installed-dev  ## run the test suite
	$(BIN)/pytest -q -n 2 --dist worksteal

slow: $(VENV)/.installed-dev  ## run the tests that `make test` leaves out (minutes)
	$(BIN)/pytest -q -n 2 --dist worksteal -m slow

test-gpu: $(VENV)/.installed-dev  ## run the tests that need a GPU
	$(BIN)/pytest -q -m gpu tests/test_gpu.py

lint: $(VENV)/.installed-dev  ## ruff, pyright and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

docs: $(VENV)/.installed-dev  ## build the documentation in docs/_build/html
	$(BIN)/sphinx-build --quiet --fresh-env --fail-on-warning docs docs/_build/html
	@echo 'open docs/_build/html/index.html'

wheel: $(VENV)/.installed-dev  ## build dist/*.whl
	$(BIN)/python -m build --wheel

clean:  ## remove the environment and every cache
	rm -rf $(VENV) dist docs/_build docs/reference
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 …' >&2; exit 1; }
	@echo '== making $(VENV) with $(PYTHON)'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip

# A stamp per installation; both are renewed when what is asked for changes.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo '== installing rite_diffusion (torch is large: this takes minutes the first time)'
	$(INSTALL) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo '== installing rite_diffusion and its test tools (torch is large: minutes the first time)'
	$(INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed
