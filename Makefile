# Two commands for a fresh clone: `make quickstart` and `make test`. `make help` lists the rest.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PY := $(VENV)/bin/python
EXTRAS ?= train,video,curate,text,eval,bench,dev
# Passed to every `pip install`. A CPU-only torch from another index: PIP_FLAGS='--index-url URL'.
PIP_FLAGS ?=
# One proof: `make proofs ONLY=resume`. Some tests: `make test TESTS='tests/data -m "not slow"'`.
ONLY ?=
TESTS ?=
# Tests that run side by side, a process each; 0 runs them one by one in this process.
JOBS ?= auto
# Waiting threads sleep instead of spinning: beside any other busy process that is many times faster.
export OMP_WAIT_POLICY ?= passive
TORCH_STAMP := $(VENV)/.torch
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart clean-runs test proofs lint format check

help: ## Show what can be made.
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{ printf "  make %-12s %s\n", $$1, $$2 }'

install: $(STAMP) ## Make .venv with all that the tests and the quickstart need, at the pinned versions.

# torch goes first and alone: packages that build against it, or merely ask for it, then find it in place.
$(TORCH_STAMP): constraints.txt
	@test -n "$(PYTHON)" || { echo "no python3.11 or python3 found; set PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
		|| { echo "Python 3.11 or 3.12 is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1); set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install $(PIP_FLAGS) --disable-pip-version-check --upgrade 'pip>=24'
	$(PY) -m pip install $(PIP_FLAGS) -c constraints.txt torch
	@touch $@

$(STAMP): $(TORCH_STAMP) pyproject.toml constraints.txt
	$(PY) -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

quickstart: $(STAMP) ## Film -> shards -> autoencoder -> latents -> DiT -> samples -> metrics -> report (runs/quickstart).
	$(PY) tools/quickstart.py

clean-runs: ## Delete runs/ and start over.
	rm -rf runs

test: $(STAMP) ## Run the tests.
	$(PY) -m pytest -n $(JOBS) --maxprocesses 8 --dist loadfile $(TESTS)

proofs: $(STAMP) ## Measure the tables of docs/proofs; ONLY=name for one. Fails on a miss.
	$(PY) -m tools.proofs $(ONLY)

lint: $(STAMP) ## Check format, lint, types, docstrings and import layers.
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pydoclint --quiet ltd tools train.py sample.py
	$(VENV)/bin/lint-imports --no-cache

format: $(STAMP) ## Rewrite the code in the project's format.
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

check: test lint ## Tests, then lint: what .ci/run runs.
