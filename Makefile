# Needs Python 3.10 or later with venv, and make. Each target does all of its own set-up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint docs clean

demo: $(VENV)/ready
	$(BIN)/python samples/demo.py

test: $(VENV)/ready lint
	$(BIN)/python -m pytest

lint: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Writes the help texts into README.md; a test checks that they are the current ones.
docs: $(VENV)/ready
	$(BIN)/python docs/help.py

# torch first and pinned: the export extra asks for the same version.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[export,dev]'
	touch $@

clean:
	rm -rf $(VENV) .demo build dist *.egg-info
