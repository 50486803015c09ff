# make demo [IMAGE=photo.jpg]   a rendered room (and a photo of yours), labelled and measured, into demo/
# make test                     everything that passes without a GPU
# make check-docs               runs what README and quick start tell to run, some minutes
# make lint | docs | bench | clean
#
# Without an active virtual environment, one is made in .venv with $(PYTHON).

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test check-docs lint docs bench clean

PYTHON ?= python3
IMAGE ?=
OUT ?= demo
SEED ?= 12
PAGES ?=

ifdef VIRTUAL_ENV
VENV := $(VIRTUAL_ENV)
else
VENV := .venv
endif
PY := $(VENV)/bin/python
# This clone's code, also where the environment was installed from another one
export PYTHONPATH := $(CURDIR)/src
# A stamp for each set of extras; it lies in the environment, so that a new environment installs anew.
STAMP := $(VENV)/.enfilade
SOURCES := pyproject.toml

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -6

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Enfilade needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	       "Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(STAMP): $(SOURCES) | $(PY)
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Enfilade needs Python 3.11 or newer; the active environment has $$($(PY) --version 2>&1)." >&2; exit 1; }
	@echo "installing Enfilade (the first time takes some minutes)"
	@$(PY) -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(STAMP)-%: $(SOURCES) | $(PY)
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Enfilade needs Python 3.11 or newer; the active environment has $$($(PY) --version 2>&1)." >&2; exit 1; }
	@echo "installing Enfilade with its '$*' extra (the first time takes some minutes)"
	@$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@ $(STAMP)

demo: $(STAMP)
	@$(PY) -m enfilade demo --out '$(OUT)' --seed $(SEED) $(if $(IMAGE),'$(IMAGE)')

# One worker per core: threads of their own would only get in each other's way.
test: export OMP_NUM_THREADS := 1
test: export NUMBA_NUM_THREADS := 1
test: $(STAMP)-dev
	@$(PY) -m pytest -q -n 2 -m 'not gpu' $(TESTS)

check-docs: $(STAMP)-dev
	@$(PY) docs/check.py $(PAGES)

lint: $(STAMP)-dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m pyright --pythonpath $(PY)

docs: $(STAMP)-docs
	@$(PY) -m sphinx -W -q docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(STAMP)-peers
	@for script in benchmarks/*.py; do echo "== $$script"; $(PY) "$$script"; done

clean:
	@rm -rf .venv demo build dist docs/_build .pytest_cache .ruff_cache
	@find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
