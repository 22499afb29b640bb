# make serve and make test need nothing but Python 3.11 or newer; everything goes into .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help serve test test-all check format bench bench-peers clean

help:
	@echo "make serve     install, fetch the default model and serve it on 127.0.0.1:8000"
	@echo "make test      install what tests need and run them"
	@echo "make test-all  also the tests that take minutes"
	@echo "make check     ruff and mypy"
	@echo "make format    let ruff rewrite what it can"
	@echo "make bench     speculation on against off, one request at a time"
	@echo "make bench-peers  beside llama.cpp, vLLM and transformers, installed in a cache folder; hours"
	@echo "make clean     remove .venv and caches"

serve: $(VENV)/.installed
	$(BIN)/gorgon serve $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/pytest $(ARGS)

test-all: $(VENV)/.installed-dev
	$(BIN)/pytest -m "not gpu" $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/gorgon bench engine $(ARGS)

bench-peers: $(VENV)/.installed-bench
	$(BIN)/gorgon bench peers $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Torch goes first and pinned, so that everybody runs the build that the tests passed with. Which build of this
# version that is, for CPU or for CUDA, is up to the package index: on Linux, PyPI has the one for CUDA.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install "$(TORCH)"
	$(BIN)/python -m pip install --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

$(VENV)/.installed-bench: pyproject.toml $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Gorgon needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
