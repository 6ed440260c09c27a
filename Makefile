# `make demo` and `make test` set everything up first. Another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
# a test file per process: what its tests share is made once
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test fast check bench clean

help:
	@echo "make demo    make a family of miniature models, and try every command on it"
	@echo "make test    run all tests (make fast: without the slow ones)"
	@echo "make check   formatting, lint and types"
	@echo "make bench   the benchmarks of docs/benchmarks.md; long"
	@echo "make setup   only make .venv, with everything in it"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,engines,dev]'
	# --no-deps: only the tokenizer's vocabulary in it is used, and it would bring torchvision and timm
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt open_clip_torch
	touch $@

demo: setup
	$(BIN)/lineage demo

test: setup
	$(PYTEST)

fast: setup
	$(PYTEST) -m "not slow and not gpu and not rehearsal"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: setup
	set -e; for name in svd signal_rank merge extract scan lora_step learning; do $(BIN)/python benchmarks/$$name.py; done
	$(BIN)/python benchmarks/zoo.py --plain

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
