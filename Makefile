# `make demo` and `make test` are all a newcomer needs; both install into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# one worker a core; the tests give torch one thread each
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadscope
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help install demo test test-slow test-seeds test-oldest test-newest fuzz soak calibration mutations \
	bench bench-scaling bench-attribution docs lint format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(STAMP)  ## install the package and its tools into .venv

demo: install  ## train a small policy with GRPO and measure its entropy change
	$(BIN)/entropy-pl fit --config configs/quickstart.yaml

test: install lint  ## lint, check types and run the default tests
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-slow: install  ## the tests that take minutes
	$(BIN)/python -m pytest $(PARALLEL) -m slow

test-seeds: install  ## does GRPO raise the demo's reward on three seeds?
	ENTROPY_PL_DEMO_SEEDS=0,1,2 $(BIN)/python -m pytest -m slow tests/test_demo.py

test-oldest:  ## the default tests on the oldest versions that setup.cfg admits (PYTHON=python3.10)
	$(call test-on,oldest,--resolution lowest-direct)

test-newest:  ## the default tests on the newest versions there are (PYTHON=python3.13)
	$(call test-on,newest,--upgrade)

# an environment of its own, of versions that no constraints file chose
define test-on
	$(PYTHON) -m venv $(VENV)-$(1)
	$(VENV)-$(1)/bin/pip install --quiet uv
	$(VENV)-$(1)/bin/uv pip install --quiet --python $(VENV)-$(1)/bin/python $(2) --editable '.[test]'
	$(VENV)-$(1)/bin/python -m pytest $(PARALLEL) -m "not slow"
endef

fuzz: install  ## 10,000 cases of broken configs, records and checkpoints instead of 1,000
	ENTROPY_PL_FUZZ_CASES=10000 $(BIN)/python -m pytest tests/fuzz

mutations: install  ## make mistakes in a copy, one at a time: does a test see each? (WORDS=snis: some; WRITE=file)
	$(BIN)/python -m tests.mutations $(WORDS) $(if $(WRITE),--write $(WRITE))

calibration: install  ## how often intervals hold the truth, by enumeration: the table of docs/reliability.md
	PYTHONPATH=tests:. $(BIN)/python tests/estimators/calibration.py $(if $(WRITE),--write $(WRITE))

soak: install  ## 1,000 optimizer steps with a probe every 5, instead of 200
	ENTROPY_PL_SOAK_STEPS=1000 $(BIN)/python -m pytest tests/test_soak.py

bench: install  ## the tables of docs/performance.md (POLICY=folder DATA=GSM8K's folder, WRITE=file puts them there)
	$(BIN)/python -m benchmarks $(if $(POLICY),--policy $(POLICY) --data $(DATA)) $(if $(WRITE),--write $(WRITE))

bench-scaling: install  ## passes and bytes of a probe, against the formulas of docs/scaling.md
	$(BIN)/python -m benchmarks.probe_cost

bench-attribution: install  ## what an attribution costs; POLICY and DATA name a policy's folder and GSM8K's
	$(BIN)/python -m benchmarks.attribution_cost --policy $(POLICY) --data $(DATA)

docs: install  ## the documentation with the API reference, as a site in docs/_build/html
	$(BIN)/sphinx-build -q -W -b html docs docs/_build/html

lint: install  ## linter, formatter and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was built, the environment included
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
