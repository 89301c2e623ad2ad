.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quick test-python test-latest fuzz test-lowest test-tf215 wheels support lint types docs gpu bench bench-quick bench-report experiments peers clean
PYTHON ?= python3
BACKENDS := tensorflow jax torch
# The development environment, and the versions in it.
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
DEV := $(VENV)/bin/
PYTEST_ARGS ?= --quiet --numprocesses 2 --dist loadfile
# With RECORD=docs/support test runs write what they tested, with which versions; `make support` draws it.
export RECORD
export TF_CPP_MIN_LOG_LEVEL ?= 2

help:  ## List the targets.
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1: /'

setup: $(VENV)/.installed  ## Make the full development environment, in .venv.

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(DEV)python -m pip install --quiet --constraint $(CONSTRAINTS) --upgrade pip
	$(DEV)python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[keras]' --group dev
	touch $@

.venv-demo/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	.venv-demo/bin/python -m pip install --quiet --constraint constraints.txt --editable . --group demo
	touch $@

demo: .venv-demo/.installed  ## Train a small model with and without Lookahead; needs nothing else installed.
	.venv-demo/bin/python examples/demo.py $(ARGS)

# The front ends that need no Keras 3; the third argument are tests of Optax and Keras 2.
define run-native-tests
	echo "== PyTorch, Optax and Keras 2"; \
	env -u KERAS_BACKEND $(1) -m pytest $(PYTEST_ARGS) $(2) tests/test_conformance.py tests/test_torch $(3) \
	    || failed="$$failed native"
endef

# Keras fixes its backend per process, so each backend has a run of its own; all run even if one fails.
define run-keras-tests
	for backend in $(BACKENDS); do \
	    echo "== Keras on $$backend"; \
	    KERAS_BACKEND=$$backend $(1) -m pytest $(PYTEST_ARGS) $(2) tests/test_conformance.py tests/test_keras \
	        || failed="$$failed $$backend"; \
	done; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }
endef

# Two processes test side by side; threads of PyTorch beyond the cores wait for each other.
test test-quick test-lowest test-tf215: export OMP_NUM_THREADS ?= 1

# Many tests compile the same programs, in this process and in others: each is compiled once by XLA for JAX.
define share-compiled-programs
	export JAX_COMPILATION_CACHE_DIR="$$(mktemp -d)" \
	    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1; \
	trap 'rm -r "$$JAX_COMPILATION_CACHE_DIR"' EXIT
endef

test: $(VENV)/.installed  ## Run all tests.
	@$(share-compiled-programs); failed=; \
	KERAS_BACKEND=jax $(DEV)python -m pytest $(PYTEST_ARGS) --doctest-modules tests/test_demo.py tests/test_package.py tests/test_benchmarks.py tests/test_experiments.py tests/test_troubleshooting.py tests/test_support.py tests/test_recipes.py docs/*.md docs/experiments/*.md \
	    $(addprefix src/lookahead_optim/,torch optax tf_keras lightning.py transformers.py) || failed="package"; \
	$(call run-native-tests,$(DEV)python,,tests/test_optax tests/test_tf_keras); \
	$(call run-keras-tests,$(DEV)python,--doctest-modules src/lookahead_optim/keras README.md docs/keras.md)

test-python:  ## Run all tests on another Python, PYTHON=python3.12 for example, with the versions in constraints.
	$(MAKE) test VENV=.venv-$(notdir $(PYTHON)) CONSTRAINTS=constraints/$(notdir $(PYTHON)).txt

wheels: $(VENV)/.installed  ## Install the wheel with each extra in a fresh environment, and run its example there.
	$(DEV)python tests/wheels.py --constraints $(CONSTRAINTS) $(ARGS)

support: $(VENV)/.installed  ## Write the page on tested versions and the classifiers from the records of test runs.
	$(DEV)python tests/support.py

test-latest:  ## Run all tests with the newest versions that there are.
	$(MAKE) test VENV=.venv-latest CONSTRAINTS=/dev/null

# The conformance suite has all front ends but Keras 3, of which there is PyTorch, where nothing is compiled. Tests that
# start processes or compile much are left out.
QUICK := tests/test_conformance.py tests/test_troubleshooting.py tests/test_torch
LEFT_OUT := $(addprefix --ignore=tests/test_,torch/test_distributed.py torch/test_trainer.py torch/test_compile.py \
    torch/test_resume.py torch/test_lightning_slow_weights.py torch/test_transformers_slow_weights.py \
    torch/test_kept_by_loops.py torch/test_workers.py keras/test_distribution.py keras/test_kills.py keras/test_kept.py keras/test_saving.py)

test-quick: $(VENV)/.installed  ## Run the conformance suite and the tests of PyTorch, in less than two minutes.
	@$(share-compiled-programs); failed=; \
	env -u KERAS_BACKEND $(DEV)python -m pytest $(PYTEST_ARGS) $(LEFT_OUT) $(QUICK) || failed="$$failed native"; \
	KERAS_BACKEND=torch $(DEV)python -m pytest $(PYTEST_ARGS) $(LEFT_OUT) tests/test_conformance.py tests/test_keras \
	    || failed="$$failed torch"; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

SECONDS_EACH ?= 600

fuzz: export FUZZ_SECONDS = $(SECONDS_EACH)
fuzz: export OMP_NUM_THREADS ?= 1
fuzz: $(VENV)/.installed  ## Random operations in every front end, SECONDS_EACH each, with new seeds; prints their number.
	@failed=; \
	for one in tests/test_torch tests/test_optax tests/test_tf_keras; do \
	    $(DEV)python -m pytest --quiet --timeout 0 -s $$one/test_random_operations.py || failed="$$failed $$one"; \
	done; \
	for backend in $(BACKENDS); do \
	    KERAS_BACKEND=$$backend $(DEV)python -m pytest --quiet --timeout 0 -s tests/test_keras/test_random_operations.py \
	        || failed="$$failed $$backend"; \
	done; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

.venv-lowest/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --upgrade pip
	sed -n 's/^demo = //p; s/^torch = //p; s/^optax = //p' pyproject.toml | grep -o '[a-z-]*>=[0-9.]*' | sed 's/>=/==/' > .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install --quiet --editable . --requirement .venv-lowest/lowest.txt --group lowest
	touch $@

test-lowest: .venv-lowest/.installed  ## Run the tests with the oldest supported versions, in .venv-lowest.
	@failed=; \
	$(call run-native-tests,.venv-lowest/bin/python,-W default,tests/test_optax/test_validation.py); \
	$(call run-keras-tests,.venv-lowest/bin/python,-W default)

.venv-tf215/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-tf215
	.venv-tf215/bin/python -m pip install --quiet --upgrade pip
	.venv-tf215/bin/python -m pip install --quiet --editable . --group tf215
	touch $@

test-tf215: .venv-tf215/.tfa-installed  ## Run the tests of Keras 2 with TensorFlow 2.15 and TensorFlow Addons, in .venv-tf215 (Python 3.9 to 3.11).
	env -u KERAS_BACKEND .venv-tf215/bin/python -m pytest $(PYTEST_ARGS) -W default tests/test_conformance.py tests/test_tf_keras

lint: $(VENV)/.installed  ## Check style and formatting.
	$(DEV)ruff check .
	$(DEV)ruff format --check .

types: $(VENV)/.installed  ## Check types.
	$(DEV)mypy

docs: $(VENV)/.installed  ## Build the documentation into docs/_build.
	KERAS_BACKEND=jax $(DEV)sphinx-build --fresh-env --fail-on-warning --quiet docs docs/_build

# timm without its dependencies: its Lookahead needs none, and not every PyTorch has a torchvision.
.venv-peers/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	.venv-peers/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[torch]' --group peers
	.venv-peers/bin/python -m pip install --quiet --constraint constraints.txt --no-deps timm
	touch $@

.venv-tf215/.tfa-installed: .venv-tf215/.installed
	.venv-tf215/bin/python -m pip install --quiet --group tfa
	touch $@

bench: $(VENV)/.installed .venv-peers/.installed  ## Measure what Lookahead adds to a step, beside its peers.
	$(MAKE) .venv-tf215/.tfa-installed || echo "Going on without TensorFlow Addons: its environment was not made. It needs Python 3.9 to 3.11."
	$(DEV)python benchmarks/run.py $(ARGS)

bench-quick: $(VENV)/.installed  ## See in two minutes that the benchmarks run, with what is installed.
	$(DEV)python benchmarks/run.py --quick $(ARGS)

# On a machine that has PyTorch, JAX and Optax for its GPU; ARGS="--wheels FOLDER" brings what it lacks.
GPU_PYTHON ?= $(PYTHON)

gpu:  ## Find out on a GPU, in at most eight minutes, whether Lookahead is correct there, waits for it, and what it costs.
	$(GPU_PYTHON) benchmarks/gpu.py $(ARGS)

# Those of the docs: a run on another machine makes a file of its own.
RESULTS ?= $(addprefix benchmarks/results/,amd_epyc.json amd_epyc_designs.json intel_xeon_processor.json)

GPU_RESULTS ?= benchmarks/results/gpu_nvidia_h100_80gb_hbm3.json

bench-report: $(VENV)/.installed  ## Make the tables and plots of the docs from RESULTS and GPU_RESULTS, files in benchmarks/results.
	$(DEV)python benchmarks/report.py docs/benchmarks $(RESULTS)
	$(DEV)python benchmarks/report_gpu.py docs/benchmarks_gpu $(GPU_RESULTS)

EXPERIMENTS := noisy_quadratic deterministic_quadratic bilinear_game outer_step slow_momentum_risk inner_moments communication workers digits adversarial label_noise characters batch_sizes bfloat16 loss_surface sensitivity

experiments: $(VENV)/.installed  ## Reproduce the paper's claims; results in experiments/results, plots in docs/experiments/drawn.
	@for one in $(EXPERIMENTS); do echo "== $$one"; $(DEV)python experiments/$$one.py $(ARGS) || exit 1; done

# CODE is a file with the paper's own PyTorch code, which is no package.
peers: $(VENV)/.installed .venv-peers/.installed .venv-tf215/.tfa-installed  ## Ask other implementations what they compute; for the docs.
	rm -f experiments/results/peers.json
	for one in .venv-peers .venv .venv-tf215; do $$one/bin/python -W ignore experiments/peers.py experiments/results $(CODE) || exit 1; done

clean:  ## Remove the environments and everything built.
	rm -rf .venv .venv-* docs/_build build dist demo-output experiments/quick .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
