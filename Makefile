# make demo: install into a private .venv and run int8run with its defaults
# make test: the same, then the tests          make check: format, lint, types
PYTHON ?= python3
BIN := .venv/bin
RUN := .venv/.run-installed
DEV := .venv/.dev-installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --use-pep517 --constraint constraints.txt

.PHONY: demo test check help clean
help:
	@sed -n '1,2s/^# //p' Makefile

demo: $(RUN)
	$(BIN)/int8run

test: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

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
	@$(PIP) --editable .
	@touch $@

$(DEV): $(RUN)
	@$(PIP) --editable '.[dev]'
	@touch $@
