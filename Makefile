# The only list of commands. CI runs these same targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Keeps the repository root off sys.path, where our `kernels/` folder would meet Hugging Face's package.
export PYTHONSAFEPATH = 1
# Two spinning OpenMP threads beside any other busy process cost 8 ms an operation; waiting does not.
export OMP_WAIT_POLICY ?= passive

.PHONY: help setup demo test lint fmt type bench package clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## make the environment in .venv and install infilld into it

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	mkdir -p .typing/infilld
	for layer in engine kernels server lsp; do ln -sfn ../../$$layer .typing/infilld/$$layer; done
	touch $(STAMP)

demo: setup ## fill a gap with the starter model, through LSP and REST
	$(BIN)/python tests/support/demo.py

test: setup ## every test that needs no GPU and no download
	$(BIN)/python -m pytest -q

lint: setup ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fmt: setup ## format in place
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

type: setup ## strict types
	$(BIN)/mypy -p infilld.kernels -p infilld.engine -p infilld.server -p infilld.lsp

bench: setup ## encode, per-pass and end-to-end times on this machine
	$(BIN)/infilld bench

package: setup ## build the wheel, install it in a clean environment, run both entry points
	rm -rf dist build/check
	$(BIN)/python -m build --quiet
	$(PYTHON) -m venv build/check
	build/check/bin/python -m pip install --quiet -c constraints.txt dist/infilld-*.whl
	cd / && $(CURDIR)/build/check/bin/infilld --version
	cd / && $(CURDIR)/build/check/bin/infilld-lsp --version
	cd / && $(CURDIR)/build/check/bin/infilld models list
	rm -rf build/check

clean: ## remove what the other commands made
	rm -rf $(VENV) .typing build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
