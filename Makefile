# Two commands on a machine with only Python (3.11 or newer) and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint types suite clean

demo: $(INSTALLED)
	$(BIN)/surefoot demo

# The checks of types need one processor only, so the suite begins beside them.
test: $(INSTALLED)
	$(MAKE) --jobs 2 lint types suite

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(INSTALLED)
	$(BIN)/mypy

suite: $(INSTALLED)
	$(BIN)/pytest -n 2

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist
