# What people and CI call. Works with `make -C DIRECTORY`; needs Python 3.11 or newer and a package index.
.DEFAULT_GOAL := help
.PHONY: help demo test slow browser check fix bench clean
.DELETE_ON_ERROR:

PYTEST = .venv/bin/python -m pytest
# Arguments for pytest, such as T="tests/registry -k promote".
T =

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

demo: .venv/installed-all ## Run the whole loop on this machine (KEEP=1 leaves it up, JSON=FILE writes the result)
	@.venv/bin/millpond demo $(if $(filter-out 0 no,$(KEEP)),--keep) $${JSON:+--json "$$JSON"}

test: .venv/installed-dev ## Run the tests that take seconds (T="…" passes arguments to pytest)
	@$(PYTEST) --numprocesses auto $(T)

slow: .venv/installed-dev ## Run the tests that take longer: installs, kills, long training
	@$(PYTEST) -m slow --numprocesses auto --dist worksteal $(T)

browser: .venv/installed-dev ## Run the tests of the pages in a real Chromium
	@$(PYTEST) -m browser $(T)

check: .venv/installed-dev ## Check style, types and the direction of imports; changes nothing
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/mypy
	@.venv/bin/lint-imports

fix: .venv/installed-dev ## Format, mend what ruff can mend, write the reference pages anew
	@.venv/bin/ruff check --fix
	@.venv/bin/ruff format
	@.venv/bin/python scripts/write_reference.py

bench: .venv/installed-dev ## Measure what the README claims; results go to benchmarks/results/
	@set -e; for file in benchmarks/*.py; do echo "==> $$file"; .venv/bin/python "$$file"; done

clean: ## Remove the virtual environment and what tools have cached
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

.venv/installed-all: pyproject.toml constraints.txt
	@scripts/install all $@

.venv/installed-dev: pyproject.toml constraints.txt
	@scripts/install dev $@
	@touch .venv/installed-all
