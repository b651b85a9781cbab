# make demo, serve-demo, test, test-all, test-quick, test-matrix, bench, docs, lint. Each makes .venv first, once: the demo
# and bench with the extra serve (training, deploy/, server), the others with all of dev.
PYTHON ?= python3
BIN := .venv/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo serve-demo test test-all test-quick test-matrix bench docs lint

demo: .venv/installed
	$(BIN)/python examples/demo.py

serve-demo: runs/demo/nkd/student/student-int8-cpu.onnx
	$(BIN)/python -m deploy.serve $<

runs/demo/nkd/student/student-int8-cpu.onnx:
	$(MAKE) demo

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not trial" $(ARGS)

test-all: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

test-quick: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow and not trial and not gpu"

test-matrix: .venv/installed-dev
	$(BIN)/python tests/matrix.py

bench: .venv/installed
	$(BIN)/python examples/benchmark_losses.py

docs: .venv/installed-dev
	$(BIN)/pdoc -d google -o build/docs kdlite
	@echo build/docs/index.html

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The sizes: of the wheels that pip install --dry-run --ignore-installed --report names, 2026-11-28; 0.6 GB with the wheel of
# torch 2.13.0+cpu. pip prefers a version +cpu to the same version without it, and the pins of constraints.txt fit both.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "kdlite needs Python >= 3.10, got `$(PYTHON) --version`: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	@echo "Fetching up to 3.4 GB, 3.0 GB of them torch with CUDA. Without a GPU 0.6 GB are enough:" \
		"PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make $(MAKECMDGOALS) (untested: out of our reach)"
	$(PIP) ".[serve]"
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "Fetching up to 0.3 GB more: the tests, the linters and the libraries of examples/loops"
	$(PIP) ".[dev]"
	@touch $@
