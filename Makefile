# Needs GNU make and Python 3.11 to 3.13; everything else goes into .venv, at the versions of requirements.lock.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow check clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
		while IFS='|' read -r target text; do printf '%-18s %s\n' "$$target" "$$text"; done

install: $(INSTALLED)  ## create .venv and install the locked dependencies

quickstart: $(INSTALLED)  ## from the shipped text to a trained BLT and a report, in some minutes
	@$(BIN)/blt quickstart

test: $(INSTALLED)  ## run the fast tests, in two processes
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(INSTALLED)  ## run the slow tests, in two processes but for those of tests/integration
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "slow and not gpu" --ignore tests/integration
	@$(BIN)/python -m pytest -q -m "slow and not gpu" tests/integration

check: $(INSTALLED)  ## lint, formatting, types, known vulnerabilities and the fast tests
	@echo "ruff check" && $(BIN)/ruff check --quiet .
	@echo "ruff format --check" && $(BIN)/ruff format --check --quiet .
	@echo "mypy" && $(BIN)/mypy --no-error-summary
	@$(BIN)/python .ci/audit.py requirements.lock
	@$(MAKE) --no-print-directory test

clean:  ## remove .venv, caches and the quickstart's output
	@rm -rf $(VENV) runs/quickstart build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# setuptools is locked too, so the packages themselves build without an isolated environment that would fetch another.
$(INSTALLED): requirements.lock pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || \
		{ echo "make: '$(PYTHON)' not found; name a Python 3.11 to 3.13: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "make: '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1); Python 3.11 to 3.13 is needed:" \
			"make PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV)"; "$(PYTHON)" -m venv $(VENV); }
	@echo "installing requirements.lock into $(VENV) (minutes, the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
