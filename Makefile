# `make demo` and `make test` need python3 (3.11 or newer), g++ and make; everything else is installed into $(VENV).
# Settings: VENV=path  PYTHON=python3.12  CXX=clang++  QWENOPT_NO_NATIVE=1 (no compiler)  TEST_ARGS=...  TEST_JOBS=2
# RELEASES=...  BENCH_ARGS=...

VENV ?= .venv
PYTHON ?= python3
TEST_ARGS ?=
TEST_JOBS ?= 2
# The oldest, the first whose bfloat16 experts are captured, the last with the older rotary embedding, the newest.
RELEASES ?= 5.0.0 5.15.1 5.18.0 5.24.0
BENCH_ARGS ?=
export CXX
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/.qwenopt
NATIVE_SOURCES := $(shell find csrc -type f ! -name '*.py' ! -name '*.pyc' 2>/dev/null)
CPP_SOURCES := $(filter %.h %.cpp %.cu %.cuh,$(NATIVE_SOURCES))

# Without a compiler the package still works, on the PyTorch references; `make` says so at every install.
HAVE_CXX := $(shell command -v $(firstword $(CXX)) 2>/dev/null)
ifeq ($(HAVE_CXX),)
  NO_CXX := 1
  export QWENOPT_NO_NATIVE := 1
endif
KIND := $(if $(filter 1,$(QWENOPT_NO_NATIVE)),pure,native)

.PHONY: help demo test releases sanitize bench lint format typecheck native install clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

demo: $(STAMPS)/$(KIND)  ## Compile the shipped demo models and compare them with eager
	@$(BIN)/qwenopt demo

# The whole suite in several processes: much of it is Python at work on a graph. Their threads have to share the cores,
# and one that spins while it waits takes the turn of one that works: 161 tests of a kernel took 26 s instead of 6
# (2 cores, 2026-11-28).
SIDE_BY_SIDE := -n $(TEST_JOBS) --dist worksteal
test: export OMP_WAIT_POLICY := passive
test: $(STAMPS)/test $(STAMPS)/$(KIND)  ## Run the tests (TEST_ARGS="-k rms_norm")
	@$(BIN)/python -m pytest $(or $(TEST_ARGS),$(SIDE_BY_SIDE) tests)

# Each release lies in a folder of its own, first on the path; nothing else is exchanged.
releases: export OMP_WAIT_POLICY := passive
releases: $(STAMPS)/test $(STAMPS)/$(KIND)  ## Test other releases of transformers (RELEASES="5.0.0 5.24.0")
	@set -e; for release in $(RELEASES); do \
	  echo "transformers $$release"; folder=build/releases/$$release; \
	  test -d $$folder || { $(PIP) install --quiet --target $$folder.part transformers==$$release; mv $$folder.part $$folder; }; \
	  PYTHONPATH=$(CURDIR)/$$folder $(BIN)/python -m pytest $(SIDE_BY_SIDE) tests/backend/test_releases.py $(TEST_ARGS); \
	done

# A copy of the package of its own, first on the path; `python -P` keeps the working directory off it. libasan must be
# loaded before anything else, and libstdc++ with it, since it wraps what that throws. Python itself leaks.
SANITIZED := build/sanitize
SANITIZE_PRELOAD = $(foreach lib,libasan.so libstdc++.so,$(shell $(or $(CXX),g++) -print-file-name=$(lib)))
sanitize: $(STAMPS)/test $(SANITIZED).stamp  ## Test the kernels under the address and undefined sanitizers (g++)
	@$(BIN)/python setup.py --quiet build_py --build-lib $(SANITIZED) 2>/dev/null
	LD_PRELOAD="$(SANITIZE_PRELOAD)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  PYTHONPATH=$(CURDIR)/$(SANITIZED) $(BIN)/python -P -m pytest tests/native \
	  --ignore=tests/native/test_guards.py $(TEST_ARGS)

$(SANITIZED).stamp: setup.py $(NATIVE_SOURCES) $(STAMPS)/run
	@echo "Compiling the native extension with sanitizers: two or three minutes"
	@$(BIN)/python setup.py --quiet build_ext --sanitize --build-lib $(SANITIZED) --build-temp $(SANITIZED).objects
	@touch $@

bench: $(STAMPS)/test $(STAMPS)/$(KIND)  ## Run the benchmarks (BENCH_ARGS="-k silu_mul")
	@$(BIN)/python -m pytest $(if $(filter bench/%,$(BENCH_ARGS)),,bench) -c bench/pytest.ini $(BENCH_ARGS)

lint: $(STAMPS)/dev  ## Check style and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(if $(CPP_SOURCES),$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES))

format: $(STAMPS)/dev  ## Repair what `make lint` finds, where a tool can
	$(BIN)/ruff check --fix-only --exit-zero .
	$(BIN)/ruff format .
	$(if $(CPP_SOURCES),$(BIN)/clang-format -i $(CPP_SOURCES))

# mypy does not see folders that an editable install maps to packages, so it reads a plain copy.
typecheck: $(STAMPS)/dev  ## Check types
	@rm -rf build/lib build/typed
	QWENOPT_NO_NATIVE=1 $(PIP) install --quiet --no-deps --no-build-isolation --target build/typed .
	MYPYPATH=build/typed $(BIN)/mypy -p qwenopt

native:  ## Build the native extension anew, in place
	@rm -rf build/temp.* build/lib.* $(STAMPS)/native
	@$(MAKE) --no-print-directory install

install: $(STAMPS)/$(KIND)  ## Install the package into $(VENV), editable

clean:  ## Remove what was built, but not $(VENV)
	rm -rf build dist *.egg-info qwenopt/_C*.so .ci/artifacts
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f $(STAMPS)/native $(STAMPS)/pure
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# --- How the environment comes to be. A stamp is as new as the last installation of what it stands for. ---

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "qwenopt needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n 1)."; \
	  echo "Install one and name it: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV)/bin/python; \
	  echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu it is in the package python3-venv."; exit 1; }

REQUIREMENTS := $(STAMPS)/run $(STAMPS)/test $(STAMPS)/dev
$(REQUIREMENTS): $(STAMPS)/%: requirements/%.txt requirements/build.txt requirements/run.txt | $(BIN)/python
	@mkdir -p $(STAMPS)
	@echo "Installing requirements/$*.txt into $(VENV)"
	@$(PIP) install $(if $(MAKE_TERMOUT),,--quiet) -r requirements/$*.txt
	@touch $@

$(STAMPS)/dev: requirements/test.txt

$(STAMPS)/native $(STAMPS)/pure: setup.py pyproject.toml $(wildcard MANIFEST.in) $(NATIVE_SOURCES) $(STAMPS)/run
	@$(if $(NO_CXX),echo "No C++ compiler '$(CXX)': installing without native kernels (QWENOPT_NO_NATIVE=1)."; \
	  echo "For the fast kernels install one (on Debian and Ubuntu: apt install g++) and run make again.")
	@echo "Installing qwenopt into $(VENV)"
	@$(if $(filter native,$(KIND)),echo "Compiling its native extension: a minute or two")
	@$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	@rm -f $(STAMPS)/native $(STAMPS)/pure
	@touch $@
