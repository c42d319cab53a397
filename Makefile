# Two commands on a machine with only Python (3.11 or newer) and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint types suite docs docs-serve dist clean

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

# Many tests start processes, each of which imports what the others do: it is to be compiled once.
suite: export PYTHONDONTWRITEBYTECODE =
suite: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist worksteal

# The documentation: into site/, strictly; or shown, and built anew when a file of docs/ changes.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

docs-serve: export NO_MKDOCS_2_WARNING = 1
docs-serve: $(INSTALLED)
	$(BIN)/mkdocs serve

# A source distribution and a wheel, into dist/.
dist: $(INSTALLED)
	rm -rf dist
	$(BIN)/hatchling build -d dist

# What is imported is compiled then; of most packages that is little.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist site
