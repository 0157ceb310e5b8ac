# The only list of commands. CI runs these same targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Keeps the repository root off sys.path, where our `kernels/` folder would meet Hugging Face's package.
export PYTHONSAFEPATH = 1
# Two spinning OpenMP threads beside any other busy process cost 8 ms an operation; waiting does not.
export OMP_WAIT_POLICY ?= passive

# Where `gpu-train` puts the model, what the next run goes on from, and the model in parts; minutes of
# training in all, after how many minutes one run stops and is evaluated, and on how many gaps.
TRAIN_OUT ?= build/gpu
TRAIN_STATE ?= $(TRAIN_OUT).training
TRAIN_PARTS ?= $(TRAIN_OUT).parts
TRAIN_MINUTES ?= 16
TRAIN_PAUSE_MINUTES ?= 8
TRAIN_ITEMS ?= 200
TRAIN_FLAGS ?= --size gpu

# Where `gpu` leaves its report, how long it may take, and its flags (--forms nvfp4, --only tests).
GPU_OUT ?= build/gpu-report
GPU_MINUTES ?= 8
GPU_FLAGS ?=

.PHONY: help setup demo test lint fmt type bench gpu gpu-train package clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## make the environment in .venv and install infilld into it

$(STAMP): pyproject.toml constraints.txt | .typing/infilld
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $(STAMP)

.typing/infilld:
	mkdir -p $@
	for layer in engine kernels server lsp; do ln -sfn ../../$$layer $@/$$layer; done

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

# Plain python3 with torch, triton, safetensors, tokenizers and pytest will do; transformers, too, to
# compare with it.
gpu: .typing/infilld ## measure on this machine's GPU: kernels, a random 26B, transformers (see GPU_)
	PYTHONPATH=.typing $(PYTHON) tests/gpu/report.py --out $(GPU_OUT) --minutes $(GPU_MINUTES) \
	  $(GPU_FLAGS)

# Plain python3 with torch, safetensors and tokenizers will do. A machine that hands back small files
# alone gets the model in parts: cat $(TRAIN_PARTS)/model.safetensors.* > model.safetensors
gpu-train: .typing/infilld ## train the 20 M model, one bounded run; again goes on (see TRAIN_ in the Makefile)
	PYTHONPATH=.typing $(PYTHON) -m infilld.engine.training $(TRAIN_FLAGS) \
	  --minutes $(TRAIN_MINUTES) --pause-minutes $(TRAIN_PAUSE_MINUTES) --items $(TRAIN_ITEMS) \
	  --out $(TRAIN_OUT) --state $(TRAIN_STATE)
	mkdir -p $(TRAIN_PARTS)
	rm -f $(TRAIN_PARTS)/model.safetensors.*
	split -b 15m $(TRAIN_OUT)/model.safetensors $(TRAIN_PARTS)/model.safetensors.
	@echo "parts of it: cat $(TRAIN_PARTS)/model.safetensors.* > model.safetensors"

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
