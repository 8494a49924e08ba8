# make serve   set up everything and serve on 127.0.0.1:8000
# make test    set up what the tests need and run them
# make lint    formatting, lint, types, import rules
# make bench   output tokens a second, here and in PEFT

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BASE := .graftwork/base
PIP := $(BIN)/pip install --disable-pip-version-check -c constraints.txt

.PHONY: serve test lint bench setup setup-test base

serve: setup base
	@$(BIN)/graftwork serve --demo

test: setup-test base
	$(BIN)/python -m pytest

lint: setup-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup-test base
	$(BIN)/python -m tests.benchmarks.serving $(BENCH)

setup: $(VENV)/.serve
setup-test: $(VENV)/.test
base: $(BASE)/graftwork_base.json

$(VENV)/.serve: pyproject.toml constraints.txt
	@echo "== installing Graftwork and its dependencies into $(VENV) (once)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.serve
	@echo "== installing the test dependencies (once)"
	$(PIP) -e '.[test]'
	@touch $@

$(BASE)/graftwork_base.json: | $(VENV)/.serve
	@echo "== making the default base model in $(BASE) (once)"
	@$(BIN)/python -m server.base --out $(BASE)
