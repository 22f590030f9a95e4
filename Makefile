# flash_ext. `make help` lists the commands.
#
# PYTHON=python3   use this environment, which has torch, and install nothing; else .venv is made
# TORCH=torch      what pip installs into .venv, for example TORCH="torch==2.11.0"
# ARGS=            more arguments for the command behind a target, for example ARGS="-k causal"

TORCH ?= torch
HAS_TORCH := $(if $(PYTHON),$(shell $(PYTHON) -c "import importlib.util as u; print(u.find_spec('torch') and 1 or '')"))
PY := $(if $(HAS_TORCH),$(PYTHON),.venv/bin/python)
READY := $(if $(HAS_TORCH),,.venv/ready)
CLANG_FORMAT = $(shell $(PY) -c "import clang_format; print(clang_format.get_executable('clang-format'))")
CXX_FILES = $(shell git ls-files '*.h' '*.cuh' '*.cpp' '*.cu')

.PHONY: help demo test bench train-check gpu-check build kernels lint format clean
.DEFAULT_GOAL := help

help: ## list the commands
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1|/p' Makefile | awk -F'|' '{printf "make %-11s %s\n", $$1, $$2}'

demo: build ## naive attention, SDPA, v1, v2 and v3 side by side on the best device present
	@$(PY) -m build_tools.environment check bench
	$(PY) -m benchmarks.demo $(ARGS)

test: build ## all tests that this machine can run
	@$(PY) -m build_tools.environment check test
	$(PY) -m pytest -q $(ARGS)

bench: build ## the papers' grid beside SDPA: table, JSON, plots
	@$(PY) -m build_tools.environment check bench
	$(PY) -m benchmarks.bench_attention $(ARGS)

train-check: build ## a small GPT trained with flash_ext and with exact attention: their losses, a plot
	@$(PY) -m build_tools.environment check bench
	$(PY) -m benchmarks.train_check $(ARGS)

gpu-check: build ## tests, memory checker and bit repeatability on a GPU, recorded in benchmarks/results
	@$(PY) -m build_tools.environment check test bench
	$(PY) -m benchmarks.gpu_check $(ARGS)

build: $(READY) ## compile the extension in place; incremental
	@$(PY) -m build_tools.environment check
	$(PY) setup.py build_ext --inplace

kernels: $(READY) ## compile every CUDA kernel with nvcc alone (no GPU needed) and check for spills
	$(if $(HAS_TORCH),,@$(PY) -m build_tools.environment nvcc)
	$(PY) -m build_tools.check_kernels

lint: $(READY) ## ruff, clang-format and the project's own rules
	@$(PY) -m build_tools.environment check dev
	$(PY) -m ruff check .
	$(CLANG_FORMAT) --dry-run -Werror $(CXX_FILES)
	$(PY) tests/lint_rules.py

format: $(READY) ## rewrite the sources as lint wants them
	$(PY) -m ruff check --fix .
	$(CLANG_FORMAT) -i $(CXX_FILES)

clean: ## remove what was built, not .venv
	rm -rf build dist flash_ext.egg-info flash_ext/*.so flash_ext/*.build.json

.venv/ready: pyproject.toml
	$(or $(PYTHON),python3) -m build_tools.environment create .venv "$(TORCH)"
	@touch $@
