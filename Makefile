PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := out/demo-2048.png

ONLY ?= *
NAMES ?=
# A process per core, each with one thread (tests/conftest.py); a file's tests stay together and share its fixtures.
PYTEST := $(BIN)/python -m pytest -n logical --dist loadfile

.PHONY: demo test test-slow faults mutants check clean

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY)
	mkdir -p out
	$(BIN)/linfusion generate --preset demo --size 2048 --output $(DEMO) --overwrite

test: $(READY)
	$(PYTEST) -m "not slow"

test-slow: $(READY)
	$(PYTEST) -m slow

# Small wrong edits of the code, each of which some test must notice; some of them with NAMES="M05 M06".
mutants: $(READY)
	$(BIN)/python -m tools.mutants $(NAMES)

# All faults at all their moments, which takes half an hour; of one kind with ONLY=kill, say.
faults: $(READY)
	$(BIN)/python -m pytest -v --faults=long tests/faults/test_$(ONLY).py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/python -m pytest tests/project/test_architecture.py tests/project/test_wheel.py

clean:
	rm -rf $(VENV) out build dist
