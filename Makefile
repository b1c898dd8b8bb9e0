PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
WORKDIR := $(or $(WORKDIR),runs/digits_lenet_imp)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# pip reads -c only for what it installs, these also for what it builds packages with.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint tables wheel clean

help:
	@echo 'make demo    find winning tickets of a small network on the digits set'
	@echo '             (WORKDIR=$(WORKDIR))'
	@echo 'make test    run the tests, JOBS=$(JOBS) at a time (PYTEST_ARGS="-k masks -x")'
	@echo 'make lint    run ruff and mypy'
	@echo 'make tables  print the tables of the docs; TABLES_ARGS=--write puts them in'
	@echo 'make wheel   build the wheel into dist/'
	@echo 'make clean   remove what builds and checks left behind; keeps $(VENV)/ and runs/'
	@echo
	@echo 'Each sets up $(VENV)/ first when it has to (PYTHON=$(PYTHON), 3.10 to 3.13).'

demo: $(STAMP)
	$(BIN)/lth-imp --preset=digits_lenet_imp --jobs=auto --workdir=$(WORKDIR)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

tables: $(STAMP)
	@$(BIN)/python docs/tables.py $(TABLES_ARGS)

# setuptools would pack what an earlier build left in build/.
wheel: $(STAMP)
	rm -rf build
	$(BIN)/python -m pip wheel -qq --no-deps --wheel-dir dist .
	@ls dist/*.whl

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find lth_tf tools flags tests -name __pycache__ -prune -exec rm -rf {} +

# Asking for pip, not for the folder: a set-up that was cut short is taken up again.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	    echo 'error: lth_tf needs Python 3.10 to 3.13, but $(PYTHON) is:' \
	      "$$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }; \
	  $(PYTHON) -m venv $(VENV); }
	@echo 'Installing lth_tf and its pinned dependencies into $(VENV)/; the first time this takes minutes.'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --use-pep517 -e '.[dev]'
	@touch $@
