# Every target sets up what it needs, so that any may be the first on a fresh machine.
#   make train ARGS="--steps 1000"      make test ARGS="tests/test_cli.py -k help"
#   make bench ARGS=--quick             make soak ARGS="--minutes 60"

PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test soak bench lint types docs clean
.DELETE_ON_ERROR:

train: .venv/.installed-train
	$(BIN)/altprop train $(ARGS)

test: .venv/.installed-dev
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

soak: .venv/.installed-dev
	$(BIN)/python tests/soak.py $(ARGS)

bench: .venv/.installed-dev
	$(BIN)/python benchmarks/gradient.py $(ARGS)

lint: .venv/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/.installed-dev
	$(BIN)/mypy

docs: .venv/.installed-dev
	$(BIN)/mkdocs build --strict

clean:
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The install is editable, so that only a change of what is installed asks for another one.
.venv/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install -q -c constraints.txt -e '.[$*]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv .venv
