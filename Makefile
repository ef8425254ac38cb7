# `make demo` and `make test` each work as the first command on a fresh clone; whichever comes second reuses the setup.
PYTHON ?= python3
# Pinned, so that everyone tests the same torch; the package itself takes any torch >= 2.11.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A process for each core, each with one thread: that is what the cores are busy with. `OMP_NUM_THREADS=4 make test` for
# other numbers of threads. In the full run files stay together, so that what one of them compiles is compiled once.
test test-fast: export OMP_NUM_THREADS ?= 1
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

.PHONY: demo test test-fast test-peft lint docs bench clean

demo: $(STAMP)
	$(BIN)/adamss-kernels demo

# Triton interprets in processes of its own: it has to be told before it is imported.
test: $(STAMP)
	TRITON_INTERPRET=1 $(PYTEST) tests/triton_interpreter.py
	$(PYTEST) --dist loadfile --no-loadscope-reorder

# Without tests that start processes, compile or train: under 90 seconds on two cores.
test-fast: $(STAMP)
	$(PYTEST) --dist worksteal -m "not slow"

# PEFT's own AdaMSS tests on fused models, with the installed release and with the first one that has AdaMSS.
test-peft: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable ".[peft-tests]"
	$(BIN)/python tests/peft_suite.py
	$(BIN)/python tests/peft_suite.py --version 0.19.0

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in build/site. A broken link or an undocumented public name fails. To read it while writing:
# .venv/bin/mkdocs serve
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(STAMP)
	$(BIN)/mkdocs build

# Under seven minutes on two cores; `make bench BENCH=--full` for the long one. Then: python tools/readme.py
bench: $(STAMP)
	$(BIN)/adamss-kernels bench --out bench/results $(BENCH)

# Python sources are used in place. The library is built again when its sources change, and the map of modules made again
# when there are others: a folder is newer then, which is why the first import must not add to it.
$(STAMP): pyproject.toml CMakeLists.txt $(shell find csrc -type f) $(shell find adamss_kernels -type d -not -name __pycache__)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install "$(TORCH)"
	$(BIN)/python -m pip install --editable ".[dev]"
	$(BIN)/python -m compileall -q adamss_kernels
	touch $@

clean:
	rm -rf $(VENV) build dist demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
