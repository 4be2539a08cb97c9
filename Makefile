# Everything a person does with this repository. `make demo` and `make test` set up what they need by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_FLAGS := --quiet --disable-pip-version-check --no-input --require-hashes --only-binary :all: --no-deps
LOCK_FLAGS := --quiet --upgrade --universal --python-version 3.11 --no-header --no-annotate --generate-hashes --overrides requirements/overrides.txt

.PHONY: demo test check bench sim sim-figures docs kill-matrix lock format clean

demo: $(VENV)/.demo ## two providers and a client on this machine, real models, receipts verified
	$(BIN)/p2pnode demo

test: $(VENV)/.test ## every test but the full matrices
	$(BIN)/python -m pytest

kill-matrix: $(VENV)/.test ## SIGKILL of provider, client and worker at every state
	$(BIN)/python -m pytest -m "matrix or not matrix" tests/real/test_kill.py

check: $(VENV)/.test ## style, types, layers, documents
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py tests/test_tidy.py tests/test_docs.py

bench: $(VENV)/.test ## ratios against peers, measured in one run
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/transport.py

sim: $(VENV)/.test ## 300 nodes under churn, partition and attack, a market that fails, and a swarm: some minutes
	for each in churn partition eclipse; do $(BIN)/p2pnode sim simulations/$$each.toml --seed 1 --set seconds=1500 || exit 1; done
	$(BIN)/p2pnode sim simulations/market.toml --seed 1
	$(BIN)/p2pnode sim simulations/swarm.toml

sim-figures: $(VENV)/.test ## every simulation with all its seeds, into simulations/results: some hours on two processors
	for each in simulations/*.toml; do $(BIN)/p2pnode sim $$each --out simulations/results; done
	$(BIN)/python -m p2pnode.sim.overview simulations

docs: $(VENV)/.test ## write the reference pages that come from tables
	$(BIN)/python -m p2pnode.cli.reference docs/reference

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: | $(VENV)/bin/python ## pin and hash the dependencies again
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile $(LOCK_FLAGS) --extra demo pyproject.toml requirements/build.in -o requirements/demo.lock
	$(BIN)/uv pip compile $(LOCK_FLAGS) --extra demo --extra test --extra bench --extra sim pyproject.toml requirements/build.in requirements/test.in -o requirements/test.lock

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: requirements/demo.lock pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install $(PIP_FLAGS) -r requirements/demo.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.test: requirements/test.lock pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install $(PIP_FLAGS) -r requirements/test.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
