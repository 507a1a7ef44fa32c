# make setup   install into .venv (again only when pyproject.toml or constraints.txt change)
# make demo    the whole pipeline on the bundled models, offline
# make test    lint, types, and the tests that are not slow
# make test-all   lint, types, every test
# make docs    write the generated parts of docs/ anew, and the page's types
# make page    build the page of web/ into the package; needs Node 20.19 or newer
# make bench   ours and the peers' trainings in turn, and how cost grows; on a quiet machine
# make peers   other projects' libraries, apart from ours, to test files against
# make s3      a client and a server of S3, apart from ours, to test runs at s3:// with

PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist loadgroup
# Areas of slow tests by commas (.ci/slow.toml), or all.
SLOW ?= none
BIN := .venv/bin
STAMP := .venv/.installed

WEB_STAMP := web/node_modules/.installed

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: setup demo test test-all tests lint types kernels docs page peers s3 bench clean

setup: $(STAMP)

# With PIP_OPTIONS=--no-compile Python compiles what it imports, instead of pip everything (40 s).
# pip warns of every link directory of its configuration that is absent; nobody can act on that.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) -c constraints.txt -e '.[dev]' \
	  2> >(sed '/^WARNING: Location .* is ignored/d' >&2)
	@touch $@

demo: $(STAMP)
	@$(BIN)/throughline demo

lint: $(STAMP)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .

types: $(STAMP)
	@$(BIN)/pyright --warnings > .venv/pyright.log || { cat .venv/pyright.log; exit 1; }

test: $(STAMP)
	@$(MAKE) --no-print-directory --jobs 3 lint types kernels
	@$(MAKE) --no-print-directory tests SLOW=$(SLOW)

test-all: SLOW := all
test-all: test

# Two workers that begin with nothing compiled would compile the same at once.
kernels: $(STAMP)
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/warm_kernels.py

# Each worker computes with one thread, so that two do not crowd each other out; a group shares what it set up.
tests: $(STAMP)
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --slow $(SLOW) $(PYTEST_ARGS)

docs: $(STAMP) $(WEB_STAMP)
	@$(BIN)/python docs/generate.py
	@cd web && npm run --silent types > node_modules/.types.log

# What people without Node have: one file in the package. `.ci/run` builds it again and fails if it differs.
page: $(WEB_STAMP)
	@cd web && npm run --silent types > node_modules/.types.log
	@cd web && npm run --silent check > node_modules/.check.log || { cat node_modules/.check.log; exit 1; }
	@cd web && npm run --silent test > node_modules/.test.log 2>&1 || { cat node_modules/.test.log; exit 1; }
	@cd web && npm run --silent build > node_modules/.build.log 2>&1 || { cat node_modules/.build.log; exit 1; }

$(WEB_STAMP): web/package.json web/package-lock.json
	@cd web && npm ci --silent --no-fund --no-audit
	@touch $@

# Apart from .venv, so that nothing of ours leans on them. dictionary_learning's dictionaries need none of its dependencies.
PEERS := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/throughline/peers
PEERS_STAMP := $(PEERS)/.installed

peers: $(PEERS_STAMP)

$(PEERS_STAMP): tests/peers/requirements.txt
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -r $< \
	  2> >(sed '/^WARNING: Location .* is ignored/d' >&2)
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps dictionary-learning==0.1.0 \
	  2> >(sed '/^WARNING: Location .* is ignored/d' >&2)
	@touch $@

# A folder for PYTHONPATH. Pins are ours but for one, which tests/s3/requirements.txt names.
S3 := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/throughline/s3
S3_STAMP := $(S3)/.installed

s3: $(S3_STAMP)

$(S3_STAMP): tests/s3/requirements.txt $(STAMP)
	@rm -rf $(S3)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --target $(S3) -r $< \
	  -c <(grep -v '^python-dateutil==' constraints.txt) 2> >(sed '/^WARNING: Location .* is ignored/d' >&2)
	@touch $@

# The benches are a GPT-2 with random weights and a small trained Llama, with tokens of stories; `SHARED` has what makes them.
SHARED ?= ../shared
BENCHES := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/throughline

bench: $(STAMP) $(PEERS_STAMP)
	@test -d $(BENCHES)/bench || $(BIN)/python $(SHARED)/bench/make_bench.py --model mid --out $(BENCHES)/bench
	@test -d $(BENCHES)/bench_stories || \
	  $(BIN)/python $(SHARED)/bench/make_bench.py --model stories --out $(BENCHES)/bench_stories
	@$(BIN)/python benchmarks/compare.py --mid $(BENCHES)/bench --stories $(BENCHES)/bench_stories \
	  --peer $(PEERS)/bin/python --script $(SHARED)/bench/peers.py --curves --write

clean:
	rm -rf .venv .pytest_cache .ruff_cache build dist
