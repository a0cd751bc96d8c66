# make demo [VIDEOS=folder]   install, then a recipe: videos -> shards -> model -> report; with captions without VIDEOS
# make test                   install, then the tests (the long ones: make test-slow; all of these at once: make test-all)
# make soak                   the long forms of tests that kill, of which the others run short ones, and what takes long
# make lint                   what CI checks besides
# make bench                  all figures of speed and memory; hours on a quiet machine; goes on where it was stopped
# make airflow-test           the DAGs in a real Airflow (installed into .venv-airflow) on a real Ray; some 8 minutes

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# two at a time, a file of tests each; more threads than that would wait for each other
JOBS := 2
TEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# which tests: `pytest -m` with that
MARKED := not slow and not soak

export VIDEOS

.PHONY: install demo test test-slow test-all soak bench airflow-test lint format clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[all]"
	@touch $(INSTALLED)

demo: install
	@if [ -n "$$VIDEOS" ]; then $(BIN)/longtake run quickstart; else \
	  $(BIN)/longtake footage runs/footage && VIDEOS=runs/footage/captions.jsonl $(BIN)/longtake run quickstart_text; fi

test: install
	$(TEST) -m "$(MARKED)"

test-slow: MARKED := slow and not soak
test-all: MARKED := not soak
soak: MARKED := soak

test-slow test-all soak: test

bench: install
	$(BIN)/python tests/benchmarks/bench.py --write

airflow-test: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/infra/airflow/run.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=.typing $(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .*_cache
