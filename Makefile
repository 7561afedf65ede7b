# make demo    real work through the broker: examples/digits.py
# make test    every test, two at a time: make test JOBS=8 where there are more cores
# make lint    ruff, mypy --strict, import-linter
# make chaos   60 s in which a worker is killed every second; then callers' and workers' histories are compared. More of
#              it: make chaos CHAOS="--everything --hand-started 2", and `python bench/chaos.py --help`
# make storm   seeded storms over the real core and links in virtual time: make storm SEEDS=20000 FIRST=0
# make failover   how long a call is away when its worker is killed
# make bench   what calls are to cost at most, and what they cost: every figure that is promised, with a mark. Five minutes.
#              Some of it: make bench BENCH="--only uvloop_512 start", and `python bench/targets.py --help`
# make peers   the same work on Ray Serve, Ray, LitServe, mosec, ipyparallel and a plain pyzmq broker, each installed apart:
#              more of it: make peers PEERS="--runs 5", and `python bench/against_peers.py --help`
# make clean   remove what these made
#
# Needs Python 3.11 or newer and make; everything else goes into .venv. Another interpreter: make PYTHON=python3.13 …

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
INPUTS := pyproject.toml setup.cfg constraints.txt

# A machine's habits are no part of a test: hypothesis and pytest behave differently under CI, colours change what a
# command prints, and FORGE_* would send the tests to somebody's broker. pip's own variables stay: they say where
# packages come from.
unexport CI CONTINUOUS_INTEGRATION BUILD_NUMBER GITHUB_ACTIONS GITLAB_CI TF_BUILD
unexport COLUMNS LINES FORCE_COLOR NO_COLOR CLICOLOR CLICOLOR_FORCE PY_COLORS TTY_COMPATIBLE TTY_INTERACTIVE
unexport PYTEST_ADDOPTS PYTEST_PLUGINS PYTEST_XDIST_AUTO_NUM_WORKERS HYPOTHESIS_PROFILE
unexport MYPYPATH PYTHONHOME PYTHONPATH PYTHONWARNINGS PYTHONSAFEPATH
# The tests start hundreds of interpreters, and each would compile every module of ours anew.
unexport PYTHONDONTWRITEBYTECODE
unexport $(filter FORGE_%,$(.VARIABLES))

# For the tests: how many at a time.
JOBS ?= 2
# For bench/chaos.py.
CHAOS ?=
# For bench/targets.py.
BENCH ?=
# For bench/against_peers.py.
PEERS ?=
# For the storms: how many, and the seed of the first.
SEEDS ?= 1000
FIRST ?= 0

.PHONY: demo test lint chaos storm failover bench peers clean
.DELETE_ON_ERROR:

demo: $(VENV)/.for-demo
	$(BIN)/python examples/digits.py

test: $(VENV)/.for-dev
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

lint: $(VENV)/.for-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

chaos: $(VENV)/.for-dev
	$(BIN)/python bench/chaos.py $(CHAOS)

storm: $(VENV)/.for-dev
	$(BIN)/python -m tests.face_to_face.storm --seeds $(SEEDS) --first $(FIRST)

failover: $(VENV)/.for-dev
	$(BIN)/python bench/failover.py

bench: $(VENV)/.for-bench
	$(BIN)/python bench/targets.py --json bench/out/targets.json $(BENCH)

peers: $(VENV)/.for-bench
	$(BIN)/python bench/against_peers.py --json bench/out/peers.json --plot bench/out/peers.png $(PEERS)

clean:
	rm -rf $(VENV) build dist bench/out .hypothesis .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	rm -rf *.egg-info client/*.egg-info cli/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps, not the programs, say what is installed: a pip that was interrupted leaves programs behind.
$(VENV)/.for-demo: $(VENV)/.made $(INPUTS)
	@echo "installing Forge broker and what its examples need into $(VENV); the first time this takes minutes (torch is large)"
	@$(PIP) install -c constraints.txt -e '.[examples,uvloop]'
	@touch $@

$(VENV)/.for-dev: $(VENV)/.made $(INPUTS)
	@echo "installing Forge broker and what its tests need into $(VENV); the first time this takes minutes (torch is large)"
	@$(PIP) install -c constraints.txt -e '.[dev,torch,examples,bench,uvloop]'
	@touch $@

$(VENV)/.for-bench: $(VENV)/.made $(INPUTS)
	@echo "installing Forge broker and what draws the picture into $(VENV); each peer gets an environment of its own below bench/out/"
	@$(PIP) install -c constraints.txt -e '.[bench,uvloop]'
	@touch $@

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Forge broker needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	    echo "Name another interpreter: make PYTHON=python3.13 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@
