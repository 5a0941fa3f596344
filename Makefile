# make fit    set up and train: a tiny model learns arithmetic by reinforcement, with SGD
# make test   set up and run the tests (minutes); make test-all adds the slow ones (an hour or more)
PYTHON ?= python3
VENV ?= .venv
# One thread: on busy cores two of them wait for each other, and the tiny model gains nothing from the second.
export OMP_NUM_THREADS ?= 1
RUN = $(VENV)/bin/python

.PHONY: fit test test-all lint install clean

fit: install
	$(RUN) -m rlvr_lightning fit --config sgd.yaml

test: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(RUN) -m pytest -q

test-all: install
	$(RUN) -m pytest -q -m "not gpu"

install: $(VENV)/.installed

# torch by itself first: any other package that asked for it could pull another build.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --disable-pip-version-check "torch==2.13.0"
	$(VENV)/bin/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

lint: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
