# `make demo` works from a bare clone with Python 3.10+, g++ 11+ and make; everything else goes into .venv. `make test` and
# `make bench` need Python's headers too, against which torch.compile compiles; offload is left out without them.
SHELL := /bin/bash
PYTHON ?= python3
TORCH ?= torch==2.13.0
# The budgets of registers that tests/aot checks hold for this compiler.
TRITON ?= triton==3.7.1
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help headers env build demo test test-slow lint format bench kernels clean

help:
	@echo "make demo       environment, build, and the main job: a Llama trained with and without memkernels"
	@echo "make test       environment, build, tests"
	@echo "make test-slow  the long sweeps, and properties on new examples"
	@echo "make lint       ruff, clang-format, mypy"
	@echo "make bench      every benchmark, and the README's figures from them"
	@echo "make kernels    compile every GPU kernel for every target; tables of registers, spills and traffic"

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
	  || { echo "memkernels: Python 3.10 or newer is missing; install it or name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "memkernels: this Python has no venv module; install it (Debian: apt-get install python3-venv)."; exit 1; }
	@printf '#if !defined(__clang__) && __GNUC__ < 11\n#error\n#endif\n' | "$${CXX:-g++}" -x c++ -E - >/dev/null 2>&1 \
	  || { echo "memkernels: a C++ compiler is missing or too old; install g++ 11 or newer, or name one with CXX."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)" "$(TRITON); sys_platform == 'linux'"
	$(BIN)/pip install -q "setuptools>=77" wheel ninja pybind11
	MEMKERNELS_BUILD=none $(BIN)/pip install -q --no-build-isolation -e ".[hf,plot,plan,examples,test,dev]"
	touch $@

headers:
	@"$$(command -v $(BIN)/python || echo $(PYTHON))" -c \
	  'import os, sys, sysconfig; sys.exit(3 * (not os.path.exists(sysconfig.get_path("include") + "/Python.h")))' \
	  2>/dev/null; test $$? -ne 3 \
	  || { echo "memkernels: Python.h is missing; install Python's headers (Debian: apt-get install python3-dev)."; exit 1; }

env: $(VENV)/.ready

build: env
	@$(BIN)/python setup.py -q build_ext --inplace

demo: build
	$(BIN)/python -m memkernels demo

# xdist runs two processes of one thread each; loadgroup keeps tests that share a session fixture together.
test: headers build
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not slow"

test-slow: headers build
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "slow or hypothesis" --hypothesis-profile=search

lint: env
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	git ls-files 'csrc/*' 'tests/*' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs $(BIN)/clang-format --dry-run --Werror

format: env
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	git ls-files 'csrc/*' 'tests/*' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs $(BIN)/clang-format -i

bench: headers build
	$(BIN)/python -m memkernels.bench
	$(BIN)/python -m memkernels.bench.plot
	$(BIN)/python -m memkernels.bench.report

kernels: build
	$(BIN)/python -m memkernels.testing.kernel_table
	$(BIN)/python -m memkernels.testing.cuda_resources

clean:
	rm -rf build dist memkernels/*.so memkernels/build_info.json
