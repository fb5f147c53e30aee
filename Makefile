# make demo: install into a private .venv and run int8run with its defaults
# make test: the same, then the fast tests (at most five minutes on two cores)
# make test-all: every test, also the slow ones   make check: format, lint, types
# make demo TORCH=cpu: with torch's build for CPUs, which is smaller than the one with CUDA that pip takes on Linux
PYTHON ?= python3
BIN := .venv/bin
RUN := .venv/.run-installed
DEV := .venv/.dev-installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --use-pep517 --constraint constraints.txt
# an address with builds of torch for one kind of device: make demo TORCH=cpu
TORCH_BUILDS := https://download.pytorch.org/whl
# one process per core with one thread each; the tests of a file share their models, so a file stays in one process
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo test test-slow test-all check help clean
help:
	@sed -n '1,4s/^# //p' Makefile

demo: $(RUN)
	$(BIN)/int8run

test: $(DEV)
	$(PYTEST) -m "not slow"

test-slow: $(DEV)
	$(PYTEST) -m slow

test-all: $(DEV)
	$(PYTEST)

check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info

# touched after a finished installation, so that the second call installs nothing
$(RUN): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "int8run needs Python 3.11 or newer; name one: make demo PYTHON=python3.12")'
	@echo "installing into .venv (torch is large; once only)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@test -z "$(TORCH)" || $(PIP) --index-url $(TORCH_BUILDS)/$(TORCH) torch
	@$(PIP) --editable .
	@touch $@

$(DEV): $(RUN)
	@$(PIP) --editable '.[dev]'
	@touch $@
