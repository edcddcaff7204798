# Two commands from a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
PYTEST_ARGS ?=
WORKERS ?= 2
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check --constraint constraints.txt
STAMP := .venv/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
BENCH_BIN := .venv-bench/bin
BENCH_PIP := $(BENCH_BIN)/python -m pip install --quiet --no-input --disable-pip-version-check
BENCH_STAMP := .venv-bench/.installed-$(shell cksum < simulations/benchmarks/pfl.txt | cut -d ' ' -f 1)
SAY := printf '== %s\n'

# Nothing is looked up on a network at run time.
export HF_HUB_OFFLINE := 1
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export TOKENIZERS_PARALLELISM := false
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help setup install assets test-assets browser demo test bench bench-pfl-env check format format-check lint types tests constraints
.NOTPARALLEL:

help: ## say what each command does
	@sed -n 's/^\([a-z-]*\):.*## /\1 \t/p' Makefile | while read -r name text; do printf '  make %-13s %s\n' "$$name" "$$text"; done
	@echo
	@echo "  PYTHON=python3.12    the Python (3.11 or newer) to make .venv with"
	@echo "  TORCH_INDEX=ADDRESS  where to take PyTorch from: its install page gives the address of its CPU index;"
	@echo "                       on Linux that build is far smaller than the default one, which carries CUDA"
	@echo "  ARGS='--quiet'       more arguments for 'fedpeft simulate' in 'make demo', or for 'make bench'"
	@echo "  WORKERS=2            how many processes run the tests of 'make test', 'make check' and 'make tests'"
	@echo "  PYTEST_ARGS='-x'     more arguments for pytest in 'make test', 'make check' and 'make tests'"

demo: setup ## set up, then run the main job: twelve sites learn sentiment together
	@out=runs/demo; if [ -e "$$out" ]; then out="runs/demo-$$(date +%Y%m%d-%H%M%S)"; fi; \
	$(SAY) "Running simulations/demo.toml; the run folder is $$out"; \
	$(BIN)/fedpeft simulate simulations/demo.toml --set "out=$$out" $(ARGS)

test: setup test-assets browser ## set up, then run every check and every test
	@$(MAKE) --no-print-directory check

check: format-check lint types tests ## formatting, lint, types and all tests, in what is set up already

setup: install assets ## .venv with everything in it, and the demo's model and data

install: $(STAMP)
	@$(SAY) "The libraries that constraints.txt pins are in .venv"

$(STAMP):
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "fedpeft needs Python 3.11 or newer, but there is no $(PYTHON) here; name another: make setup PYTHON=python3.12." >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "fedpeft needs Python 3.11 or newer, but $(PYTHON) is $$("$(PYTHON)" -V 2>&1); name another: make setup PYTHON=python3.12." >&2; exit 2; }
	@if [ ! -x $(BIN)/python ]; then $(SAY) "Making .venv with $$("$(PYTHON)" -V 2>&1)"; "$(PYTHON)" -m venv .venv || { \
		echo "The environment could not be made; on Debian and Ubuntu, 'apt-get install python3-venv' brings what is missing." >&2; \
		rm -rf .venv; exit 2; }; fi
	@$(SAY) "Installing $(TORCH)$(if $(TORCH_INDEX), from the index that TORCH_INDEX names)"
	@$(PIP) $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$(TORCH)"
	@if ! command -v nvidia-smi >/dev/null && $(BIN)/python -W ignore -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then \
		$(SAY) "This PyTorch carries CUDA, which no GPU here can use; it works. For the smaller build: 'make help', TORCH_INDEX"; fi
	@$(SAY) "Installing fedpeft and the libraries that constraints.txt pins"
	@$(PIP) --editable '.[simulation,data,vision,quantised,monitoring,privacy,dev]'
	@rm -f .venv/.installed-* && touch $@

assets: $(STAMP)
	@$(SAY) "Fetching the demo's model and data, unless they are here"
	@$(BIN)/fedpeft assets fetch demo

test-assets: $(STAMP)
	@$(SAY) "Fetching the models that tests read besides, unless they are here"
	@for name in chat dinov2; do $(BIN)/fedpeft assets fetch $$name || exit; done

browser:
	@if command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		$(SAY) "Installing chromium, in which a test opens the report"; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends chromium; } >/dev/null; \
	else \
		echo "The test that opens the report needs chromium or google-chrome; install one, for example: sudo apt-get install chromium." >&2; \
		exit 2; \
	fi

format: $(STAMP) ## write the code in its one form
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix-only .

format-check: $(STAMP)
	@$(SAY) "Formatting"
	@$(BIN)/ruff format --check .

lint: $(STAMP) ## ruff
	@$(SAY) "Lint"
	@$(BIN)/ruff check .

types: $(STAMP) ## mypy --strict
	@$(SAY) "Types"
	@$(BIN)/mypy

# Files go to processes whole, because what a file's tests share is dear; each process computes with one thread.
tests: $(STAMP) ## pytest, in WORKERS processes
	@$(SAY) "Tests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(PYTEST_ARGS)

bench: setup ## measure this machine: a table, and results/local.json (ARGS='--name laptop --only speed')
	@$(SAY) "Benchmarks"
	@$(BIN)/python -m simulations.benchmarks.suite $(ARGS)

bench-pfl-env: $(BENCH_STAMP) ## .venv-bench, with Apple's pfl, which 'make bench' then measures too
	@$(SAY) "Apple's pfl is in .venv-bench; measure it alone: make bench ARGS='--only pfl'"

$(BENCH_STAMP):
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || { \
		echo "pfl needs Python 3.11 or 3.12 here, but $(PYTHON) is $$("$(PYTHON)" -V 2>&1); name another: make bench-pfl-env PYTHON=python3.12." >&2; exit 2; }
	@if [ ! -x $(BENCH_BIN)/python ]; then $(SAY) "Making .venv-bench with $$("$(PYTHON)" -V 2>&1)"; "$(PYTHON)" -m venv .venv-bench; fi
	@$(SAY) "Installing $(TORCH)$(if $(TORCH_INDEX), from the index that TORCH_INDEX names)"
	@$(BENCH_PIP) $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$(TORCH)"
	@$(SAY) "Installing pfl and what simulations/benchmarks/pfl.txt names"
	@$(BENCH_PIP) --requirement simulations/benchmarks/pfl.txt
	@rm -f .venv-bench/.installed-* && touch $@

constraints: $(STAMP) ## write the versions in .venv to constraints.txt
	@sed -n '/^#/p' constraints.txt > constraints.new
	@$(BIN)/python -m pip list --disable-pip-version-check --format freeze --exclude-editable --exclude pip --exclude setuptools --exclude wheel \
		| sed 's/+[a-z0-9.]*$$//' >> constraints.new
	@mv constraints.new constraints.txt
	@$(SAY) "constraints.txt holds the versions in .venv"
