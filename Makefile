# make demo, serve-demo, test, test-all, test-quick, test-matrix, bench, docs, lint. Each makes .venv first, once.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo serve-demo test test-all test-quick test-matrix bench docs lint

demo: .venv/installed
	$(BIN)/python examples/demo.py

serve-demo: runs/demo/nkd/student/student-int8-cpu.onnx
	$(BIN)/python -m deploy.serve $<

runs/demo/nkd/student/student-int8-cpu.onnx:
	$(MAKE) demo

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not trial" $(ARGS)

test-all: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

test-quick: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow and not trial and not gpu"

test-matrix: .venv/installed
	$(BIN)/python tests/matrix.py

bench: .venv/installed
	$(BIN)/python examples/benchmark_losses.py

docs: .venv/installed
	$(BIN)/pdoc -d google -o build/docs kdlite
	@echo build/docs/index.html

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "kdlite needs Python >= 3.10, got `$(PYTHON) --version`: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
