# make setup   install into .venv (again only when pyproject.toml or constraints.txt change)
# make demo    the whole pipeline on the bundled models, offline
# make test    lint, types, tests
# make docs    write the generated parts of docs/ anew

PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist loadgroup
BIN := .venv/bin
STAMP := .venv/.installed

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: setup demo test lint types docs clean

setup: $(STAMP)

# pip warns of every link directory of its configuration that is absent; nobody can act on that.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' \
	  2> >(sed '/^WARNING: Location .* is ignored/d' >&2)
	@touch $@

demo: $(STAMP)
	@$(BIN)/throughline demo

lint: $(STAMP)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .

types: $(STAMP)
	@$(BIN)/pyright --warnings > .venv/pyright.log || { cat .venv/pyright.log; exit 1; }

# Each worker computes with one thread, so that two do not crowd each other out.
test: $(STAMP) lint types
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

docs: $(STAMP)
	@$(BIN)/python docs/generate.py

clean:
	rm -rf .venv .pytest_cache .ruff_cache build dist
