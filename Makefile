# make test     everything that must hold: style, types, tests (sets up .venv first)
# make lint     style and types only
# make format   rewrite the sources in the house style
# make clean    remove caches and build leftovers; keeps .venv and logs

VENV ?= .venv
# Half as many again as there are cores: some tests wait for processes of their own.
JOBS ?= $(shell n=$$(( $$(nproc) * 3 / 2 )); echo $$(( n > 12 ? 12 : n )))
PYTHON := $(VENV)/bin/python

# One thread per process: the tests already run in as many processes as there are cores.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1

.PHONY: test lint format clean setup

test: setup lint
	$(PYTHON) -m pytest -n $(JOBS) --dist loadgroup --no-loadscope-reorder

lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format: setup
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

setup:
	@bash requirements/install.sh embodied --model openpi --env maniskill --env frankasim --env libero --ray \
		--lerobot --dev --bench --venv $(VENV)

clean:
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
