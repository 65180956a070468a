# make demo     train a small Llama twice, plain and with mHC, and compare (two to three minutes)
# make test     everything there is to check: lint, types, tests, kernels compiled ahead for GPUs that are not there
# make bench    every benchmark in its quick form on the CPU; `python -m benchmarks all --device cuda` measures a GPU
# make matrix   the core tests on every supported PyTorch and Python that can be installed here (hours, gigabytes)
# make kernels  every kernel compiled ahead, on the newest Triton and on the lowest that is supported
# make lint | format | types | clean
#
# Each target makes the environment that it needs in .venv. To use an environment that exists already (a GPU
# machine's, a container's), with the package and its extras installed there: make test VENV=none PYTHON=python
PYTHON ?= python3
VENV ?= .venv
# Tests that share something expensive name it in an xdist_group, and then run in one process.
PYTEST_ARGS ?= -n 2

# A machine with no NVIDIA GPU gets the CPU build of PyTorch: the CUDA one is some gigabytes larger.
TORCH_CPU := torch==2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu

# The lowest Triton that pyproject.toml allows lies in a folder of its own, before the environment's own in the path.
TRITON_LOW := $(shell sed -n 's/.*"triton>=\([0-9.]*\);.*/\1/p' pyproject.toml)
TRITON_LOW_HOME := $(VENV)/triton-$(TRITON_LOW)

ifeq ($(VENV),none)
PY := $(PYTHON)
TYPES_PY := $(PYTHON)
DEMO_READY :=
TEST_READY :=
TRITON_LOW_READY :=
else
PY := $(VENV)/bin/python
TYPES_PY := $(abspath $(VENV)/bin/python)
DEMO_READY := $(VENV)/.demo-ready
TEST_READY := $(VENV)/.test-ready
TRITON_LOW_READY := $(TRITON_LOW_HOME)/.ready
endif

# passes/ and kernels/ import as mhc_compile.passes and mhc_compile.kernels, which tools that read files cannot know from
# where they lie: they get a folder of links that lies as the package imports.
define LINK_TREE
rm -rf build/types
mkdir -p build/types/mhc_compile
ln -s $(CURDIR)/mhc_compile/* $(CURDIR)/passes $(CURDIR)/kernels build/types/mhc_compile/
endef
IMPORTS := PYTHONPATH=. $(TYPES_PY) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'

export HF_HUB_OFFLINE := 1

.PHONY: demo test bench matrix lint format types kernels clean
.DELETE_ON_ERROR:

demo: $(DEMO_READY)
	$(PY) -m mhc_compile demo

test: lint types
	$(PY) -m pytest $(PYTEST_ARGS)
	$(MAKE) kernels

bench: $(TEST_READY)
	$(PY) -m benchmarks all --device cpu --quick

matrix: $(TEST_READY)
	$(PY) -m tests.matrix

kernels: $(TEST_READY) $(TRITON_LOW_READY)
	$(PY) -m benchmarks.compile_ahead
ifneq ($(TRITON_LOW_READY),)
	PYTHONPATH=$(TRITON_LOW_HOME) $(PY) -m benchmarks.compile_ahead
endif

lint: $(TEST_READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(LINK_TREE)
	cd build/types && $(IMPORTS) ../../pyproject.toml --no-cache

format: $(TEST_READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(TEST_READY)
	$(LINK_TREE)
	cd build/types && $(TYPES_PY) -m mypy --config-file ../../pyproject.toml -p mhc_compile

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch-ready: $(VENV)/bin/python pyproject.toml
	$(PY) -m pip install -qq --upgrade pip
	@if command -v nvidia-smi >/dev/null 2>&1; then \
		echo "NVIDIA GPU found: PyTorch comes with its CUDA libraries"; \
	else \
		echo "no NVIDIA GPU found: installing the CPU build of PyTorch"; \
		$(PY) -m pip install -qq --no-deps "$(TORCH_CPU)" --extra-index-url $(CPU_INDEX); \
	fi
	@touch $@

$(VENV)/.demo-ready: $(VENV)/.torch-ready
	@echo "installing mhc-compile and what the demo needs"
	$(PY) -m pip install -qq -e ".[demo]"
	@touch $@

$(VENV)/.test-ready: $(VENV)/.torch-ready
	@echo "installing mhc-compile and what its tests need"
	$(PY) -m pip install -qq -e ".[demo,test,lint]"
	@touch $@ $(VENV)/.demo-ready

$(TRITON_LOW_READY): $(VENV)/.torch-ready
	rm -rf $(TRITON_LOW_HOME)
	$(PY) -m pip install -qq --no-deps --target $(TRITON_LOW_HOME) "triton==$(TRITON_LOW).*"
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info demo_output .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
