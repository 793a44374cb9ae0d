# `make quickstart` and `make test` do all their own set-up in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# On a machine without a GPU outside our own: TORCH_INDEX = URL of PyTorch's CPU wheel index (see README, "Install").
TORCH_INDEX ?=
BIN = .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: setup quickstart test check-gpu lint clean

setup: .venv/ready

.venv/ready: setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; assert v >= (3, 11), f"Python 3.11 or newer is needed, {sys.executable} is {v.major}.{v.minor}: set PYTHON=..."'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

quickstart: .venv/ready
	$(BIN)/python examples/quickstart/run.py

test: .venv/ready
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# CHECK_ARGS: options of the command, as "--only kernels benchmark"
check-gpu: .venv/ready
	$(BIN)/python tools/check_gpu.py $(CHECK_ARGS)

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

clean:
	rm -rf .venv build *.egg-info examples/quickstart/build examples/skills/build
