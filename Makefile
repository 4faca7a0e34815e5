# make demo and make test are all a newcomer needs; both make the environment first.
# DALI's build, for CUDA 12 or 13; once chosen it stays.
CUDA ?= $(or $(patsubst .venv/.installed-cuda%,%,$(firstword $(wildcard .venv/.installed-cuda*))),13)
N ?= 100
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n > 8 ? 8 : n)))
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-cuda$(CUDA)

.PHONY: setup demo test soak bench lint clean
setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; try: make setup PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "Python's venv module is missing; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cuda$(CUDA),remote,dev]'
	@rm -f $(VENV)/.installed-cuda* && touch $@

# With SIGINT ignored here `deepspeed` itself waits, while its child ends the ranks in order: Ctrl-C saves, then ends.
demo: setup
	$(BIN)/python -m data_pipeline.build digits data/digits
	@trap '' INT; PATH="$(abspath $(BIN)):$$PATH" deepspeed --quiet --num_accelerators 2 pretrain/main.py --recipe recipes/demo.yaml
	$(BIN)/python -m pretrain.evaluate runs/demo --data data/digits

# Whole runs have the machine for themselves. Those on a cluster mostly wait for Slurm, so two tests share it: the
# clusters have nothing in common.
test: setup
	$(BIN)/python -m pytest $(PYTEST_FLAGS) --numprocesses $(JOBS) --dist loadfile --ignore tests/system --ignore tests/slurm
	$(BIN)/python -m pytest $(PYTEST_FLAGS) tests/system
	$(BIN)/python -m pytest $(PYTEST_FLAGS) --numprocesses 2 --dist worksteal tests/slurm

# Kills a run N times at random moments, with random ranks and ZeRO stages, and compares it with an untouched one.
soak: setup
	$(BIN)/python -m data_pipeline.build digits data/digits
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.system.soak --rounds $(N) --folder $$(mktemp -d)

# The network, the input, the trainer and the whole beside their alternatives; docs/performance.md is made of it.
bench: setup
	$(BIN)/python -m benchmarks

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf data runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
