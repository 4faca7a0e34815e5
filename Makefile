# `make demo` and `make test` need Python 3.11+ and make only; both create the environment first.
N ?= 100
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n > 8 ? 8 : n)))
PYTHON ?= python3
EXTRAS ?= remote,dev,docs
WHEELHOUSE ?= wheelhouse
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest $(PYTEST_FLAGS)

.PHONY: setup wheelhouse demo test test-system test-cluster test-all soak storm bench lint docs clean
setup: $(STAMP)

# pip's progress is shown on a terminal and left out of logs.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; try: make setup PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "Python's venv module is missing; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "installing the packages pinned in constraints.txt into $(VENV) (a few minutes)"
	@if [ -t 1 ]; then quiet=; else quiet=--quiet; fi; \
	    DS_BUILD_OPS=0 $(BIN)/pip install $$quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

# Wheels of all that `make setup` installs, for machines without internet with the same Python and build of torch. There:
# PIP_NO_INDEX=1 PIP_FIND_LINKS=$PWD/wheelhouse make setup
wheelhouse:
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/pip wheel --constraint constraints.txt --wheel-dir $(WHEELHOUSE) '.[$(EXTRAS)]'
	rm -f $(WHEELHOUSE)/lavit_pretrain-*.whl

# With SIGINT ignored here, `deepspeed` waits while the ranks save and exit: Ctrl-C stops the run cleanly.
demo: setup
	$(BIN)/python -m data_pipeline.build digits data/digits
	@trap '' INT; PATH="$(abspath $(BIN)):$$PATH" deepspeed --quiet --num_accelerators 2 pretrain/main.py --recipe recipes/demo.yaml
	$(BIN)/python -m pretrain.evaluate runs/demo --data data/digits

# Quick tests, one complete run from shards to hand-off among them.
test: setup
	$(PYTEST) --numprocesses $(JOBS) --dist worksteal -m "not slow and not slurm"

# Complete runs that are stopped, killed and resumed, and whatever takes more than ten seconds.
test-system: setup
	$(PYTEST) --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "slow and not slurm"

# Slurm clusters on this machine. The tests mostly wait for Slurm, so two run at a time; their clusters share nothing.
test-cluster: setup
	$(PYTEST) --numprocesses 2 --dist worksteal -m "slurm and not evening"

# Forty random events over a run on a cluster like a site's, where Slurm waits two minutes before each restart.
storm: setup
	$(PYTEST) -m evening

test-all: test test-system test-cluster

# Kills a run N times at random moments, with random numbers of ranks and ZeRO stages; compares it with an untouched run.
soak: setup
	$(BIN)/python -m data_pipeline.build digits data/digits
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.system.soak --rounds $(N) --folder $$(mktemp -d)

# Model, input pipeline, trainer and end-to-end benchmarks, compared with alternatives; see docs/performance.md.
bench: setup
	$(BIN)/python -m benchmarks

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# The site in site/, from README.md and docs/; a broken link or anchor fails.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf data runs site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
