# `make` alone says what there is. Everything runs in .venv, which the targets make when it is missing.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export PYTHONDONTWRITEBYTECODE =# where it is set, each of the processes that tests start would compile the library anew
export HF_HUB_DISABLE_TELEMETRY = 1
QUICK := --quiet --no-compile# what is imported is compiled then; to compile all that is installed takes as long as to install it

help: ## what the targets do
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: .venv/installed ## make .venv and install the package with the locked requirements

.venv/installed: pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "FedExperts needs Python 3.11 or newer; run make PYTHON=python3.11 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(QUICK) torch==2.13.0
	$(BIN)/python -m pip install $(QUICK) -r requirements.lock
	$(BIN)/python -m pip install $(QUICK) --no-deps -e .
	touch $@

quickstart: install ## FedMoE against FedAvg, random sub-models and local training; 2 to 4 minutes on two cores
	$(BIN)/fedexperts compare runs/quickstart.toml --methods fedmoe,random_moe,fedavg,local --out results/quickstart

test: install ## the whole suite
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/device
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/device # by themselves: torch has to know a device before any backward pass

check: install lint types test ## all that has to hold: format, lint, types, tests

lint: install ## ruff: format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install ## mypy, strict
	$(BIN)/mypy

format: install ## mend the format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: install ## the documentation as a site, in build/docs (to search it: python -m http.server -d build/docs); a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: install ## the package as a wheel, in dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

bench: install ## what federation, sub-models, a selective backward, personal experts, messages and the engines cost
	for name in overhead submodel selective_backward graft wire; do $(BIN)/python benchmarks/$$name.py || exit 1; done
	$(BIN)/python -m benchmarks.engines

smol: install ## build the base smol in FEDEXPERTS_BASES: SmolLM2-135M-Instruct as a Mixture of Experts; half an hour (with AVX-512 and bfloat16) to an hour and a half on two cores; needs FEDEXPERTS_DATA
	sh assets/smol/build.sh $(BIN)/fedexperts $(BIN)/python

results-check: install ## compare the pages of results with what their templates and CSVs give
	$(BIN)/python benchmarks/results_pages.py --check

ceilings: install ## what the base small reaches on each data set by itself; needs FEDEXPERTS_DATA
	$(BIN)/python benchmarks/ceilings.py --epochs 5 --lr 1.5e-3

fedmoe: install ## FedMoE's experiment in full: four settings, three seeds; hours; needs FEDEXPERTS_DATA
	sh runs/fedmoe/table.sh $(BIN)/fedexperts

fedmoe-short: install ## the same in little: one setting, one seed, half the rounds; minutes
	sh runs/fedmoe/short.sh $(BIN)/fedexperts

hfedmoe: install ## HFedMoE's experiment in full: two settings, three seeds, then its ablations and sweeps; hours; needs FEDEXPERTS_DATA
	sh runs/hfedmoe/table.sh $(BIN)/fedexperts
	sh runs/hfedmoe/ablations.sh $(BIN)/fedexperts

flex: install ## FLEx's experiment in full: Super-NI and three divisions of Dolly, five seeds, then its ablations; hours; needs FEDEXPERTS_DATA
	sh runs/flex/table.sh $(BIN)/fedexperts
	sh runs/flex/ablations.sh $(BIN)/fedexperts

clean: ## remove what was made, except .venv
	rm -rf results build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

.PHONY: help install quickstart test check lint types format docs wheel bench smol ceilings fedmoe fedmoe-short hfedmoe flex clean
.DEFAULT_GOAL := help
