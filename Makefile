# Everything on a fresh machine with Python 3.11 to 3.13:  make quickstart,  make test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Huge pages: without them page faults took about 30 % of a step on the CPU it was measured on.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1

.PHONY: quickstart test test-all lint clean

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 13) else "Python 3.11 to 3.13 is needed; this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# The core for the quickstart; for the tests also what the other doors need: seqio, TensorFlow, Beam, torch, lm_eval
$(VENV)/core $(VENV)/test: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --editable '.$(if $(filter %test,$@),[test])'
	touch $@

# Options for the quickstart: make quickstart ARGS='--data text:my/*.txt --seeds 3'
quickstart: $(VENV)/core
	$(BIN)/python experiments/quickstart.py $(ARGS)

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow' $(ARGS)

# With the slow ones: runs killed at random moments
test-all: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
