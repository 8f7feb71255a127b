PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= cluster/configs/demo.yaml

.PHONY: help setup serve test check nodes chaos fuzz bench docs clean

help:  ## This list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/.installed  ## Make .venv and install everything, pinned

$(VENV)/.installed: requirements-cpu.txt pyproject.toml
	@PYTHONSAFEPATH= $(PYTHON) -m tools.install $(VENV)
	@touch $@

serve: setup  ## Serve the demo on this machine until Ctrl-C (CONFIG=file for another)
	@exec $(BIN)/pdserve up $(CONFIG)

test: setup  ## The test suite, real engines included
	$(BIN)/python -m pytest

check: setup  ## What CI runs: formatting, lint, types, docs, tests, two minutes of faults
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest -m nodes
	$(BIN)/python -m benchmarks.chaos --minutes 2 --out build/chaos.md

nodes: setup  ## Three Ray nodes in network namespaces, then an engine over two of them (as root, with nft)
	$(BIN)/python -m pytest -m nodes
	$(BIN)/python -m pytest -m spanning

chaos: setup  ## Kill, stop and starve replicas under load for five minutes, and check every answer
	$(BIN)/python -m benchmarks.chaos

fuzz: setup  ## Send a live cluster whatever a client may send for ten minutes, and check the good answers
	$(BIN)/python -m benchmarks.fuzz --minutes 10

bench: setup  ## Compare with bare vLLM and Ray Serve LLM; writes benchmarks/results/
	$(BIN)/python -m benchmarks.compare

docs: setup  ## Write the generated pages anew and build the documentation into build/site
	$(BIN)/pdserve config-reference --into docs/configuration.md
	$(BIN)/pdserve metrics-reference --into docs/metrics.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info
