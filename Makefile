.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types docs bench clean
PYTHON ?= python3
BACKENDS := tensorflow jax torch
DEV := .venv/bin/
export TF_CPP_MIN_LOG_LEVEL ?= 2

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1: /'

setup: .venv/.installed  ## Make the full development environment, in .venv.

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(DEV)python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(DEV)python -m pip install --quiet --constraint constraints.txt --editable '.[keras]' --group dev
	touch $@

.venv-demo/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

demo: .venv-demo/.installed  ## Train a small model with and without Lookahead; needs nothing else installed.
	.venv-demo/bin/python -m lookahead_optim.demo $(ARGS)

# Keras fixes its backend per process, so each backend has a run of its own; all run even if one fails.
test: .venv/.installed  ## Run all tests.
	@failed=; \
	KERAS_BACKEND=jax $(DEV)python -m pytest tests README.md docs --ignore tests/keras --ignore tests/test_conformance.py || failed="$$failed package"; \
	for backend in $(BACKENDS); do \
	    echo "== Keras on $$backend"; \
	    KERAS_BACKEND=$$backend $(DEV)python -m pytest tests/test_conformance.py tests/keras src/lookahead_optim/keras || failed="$$failed $$backend"; \
	done; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

lint: .venv/.installed  ## Check style and formatting.
	$(DEV)ruff check .
	$(DEV)ruff format --check .

types: .venv/.installed  ## Check types.
	$(DEV)mypy

docs: .venv/.installed  ## Build the documentation into docs/_build.
	KERAS_BACKEND=jax $(DEV)sphinx-build --fail-on-warning --quiet docs docs/_build

bench: .venv/.installed  ## Measure what Lookahead adds to an optimizer step.
	$(DEV)python benchmarks/step.py $(ARGS)

clean:  ## Remove the environments and everything built.
	rm -rf .venv .venv-demo docs/_build build dist demo-output .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
