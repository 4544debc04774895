# Every goal works as the first command on a bare machine: the environment is a prerequisite of each.
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
ENV := .venv/.installed
OLDEST := .venv-oldest/.installed

.PHONY: demo test test-oldest test-all lint check bench clean
.NOTPARALLEL:

demo: $(ENV)  ## the whole tour on the bundled model; writes demo/index.html
	$(BIN)/repkit demo

test: $(ENV)  ## the quick suite
	$(BIN)/python -m pytest -q -m "not slow"

test-oldest: $(OLDEST)  ## the quick suite on the oldest versions that pyproject.toml allows
	.venv-oldest/bin/python -m pytest -q -m "not slow"

test-all: $(ENV) test-oldest  ## the quick suite on the oldest versions, then the whole suite
	$(BIN)/python -m pytest -q

lint: $(ENV)  ## style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

check: test lint

bench: $(ENV)  ## every benchmark, one after the other
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

clean:
	rm -rf build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(ENV): constraints.txt
$(OLDEST): constraints-oldest.txt

$(ENV) $(OLDEST): pyproject.toml
	@test -x $(@D)/bin/python || test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found as python3.11 or python3;\
	 install one, or name it: make PYTHON=/path/to/python $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D) || { rm -rf $(@D); echo "$(PYTHON) -m venv failed;\
	 install its venv module (Debian: apt install python3-venv) or name another: make PYTHON=..." >&2; exit 2; }
	$(@D)/bin/python -m pip install --disable-pip-version-check -c $(filter constraints%,$^) -e '.[dev,serve]'
	touch $@
