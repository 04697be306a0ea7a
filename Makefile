# make demo: from nothing to a compressed model and its report.  make test: everything CI runs.
PYTHON ?= python3
BIN := .venv/bin
BENCHES := $(filter-out harness,$(patsubst bench/%.py,%,$(filter-out bench/__init__.py,$(wildcard bench/*.py)))) \
  $(patsubst bench/%/__main__.py,%,$(wildcard bench/*/__main__.py))

.PHONY: setup demo test lint bench clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard cpp/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -U pip
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt --group test --group lint --group bench -e ".[hf,cli,serve]"
	touch $@

demo: setup
	$(BIN)/waterfill compress demo -o out/demo --bits 3 --force
	$(BIN)/waterfill eval out/demo --against demo --layers
	$(BIN)/waterfill generate out/demo --prompt "Once upon a time"
	$(BIN)/waterfill report out/demo -o out/demo/report.html

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

bench: setup
	@failed=; for b in $(BENCHES); do $(BIN)/python -m bench.$$b --json out/bench-$$b.json || failed="$$failed $$b"; done; \
	test -z "$$failed" || { echo "missed bars in:$$failed"; exit 1; }

clean:
	rm -rf build out .venv
