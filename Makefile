# `make quickstart` and `make test` do all their own set-up in .venv. With PYTHON=python3.12 they make it of another Python.
PYTHON ?= $(shell command -v .venv/bin/python || command -v python3.11 || command -v python3.12 || command -v python3)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# megatron-core from 0.17 on needs Python 3.12, so that 3.11 has versions of its own; 3.13 has those of 3.12.
CONSTRAINTS := $(if $(filter 3.11,$(VERSION)),constraints.txt,constraints-py312.txt)
# On a machine without a GPU outside our own: TORCH_INDEX = URL of PyTorch's CPU wheel index (see docs/install.md).
TORCH_INDEX ?=
BIN = .venv/bin
READY = .venv/ready-$(VERSION)
READY_FOR_TESTS = .venv/ready-for-tests-$(VERSION)
# Without --no-compile pip would compile every module of every package, one after the other. Python compiles those that are imported.
# Twice quiet: newer versions of pip show the warnings of builds.
INSTALL = $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-compile -c $(CONSTRAINTS)
export OMP_NUM_THREADS ?= 1
# Some container images set this variable. Then every process would compile all modules that it imports: 12 CPU seconds more for torch and
# transformers, in each of the hundreds of processes that the tests start.
export PYTHONDONTWRITEBYTECODE =

.PHONY: setup setup-tests quickstart test check-gpu lint docs clean

setup: $(READY)

# Of this Python, with torch.
define VENV
	@$(PYTHON) -c 'import sys; v = sys.version_info; assert v >= (3, 11), f"Python 3.11 or newer is needed, {sys.executable} is {v.major}.{v.minor}: set PYTHON=..."'
	@test ! -e .venv || test -e $(BIN)/python$(VERSION) || { echo ".venv is of another Python than $(VERSION): leave PYTHON out to use it, or remove it (rm -r .venv) to have it made anew"; exit 1; }
	$(PYTHON) -m venv .venv
	$(INSTALL) --upgrade pip || true  # Python 3.11's pip takes twice the CPU time; it is used if there is no newer one
	$(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
endef

$(READY): setup.py pyproject.toml $(CONSTRAINTS)
	$(VENV)
	$(INSTALL) -e .
	@touch $@

# Python compiles torch while pip installs the rest. Otherwise each of the test processes would compile it, all at the same time.
$(READY_FOR_TESTS): setup.py pyproject.toml $(CONSTRAINTS)
	$(VENV)
	$(BIN)/python -W ignore -c 'import torch._inductor.compile_fx, torch.distributed.launcher' & $(INSTALL) -e '.[dev]'; code=$$?; wait; exit $$code
	@touch $(READY) $@

setup-tests: $(READY_FOR_TESTS)

quickstart: $(READY)
	$(BIN)/python examples/quickstart/run.py

# In three processes, a file in one of them: some tests wait for servers and time limits.
# `make test PYTEST_ARGS='-n 0 -s'`: in one, which shows what tests print.
test: $(READY_FOR_TESTS)
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# CHECK_ARGS: options of the command, as "--only kernels benchmark"
check-gpu: $(READY)
	$(BIN)/megatron-fuse check-gpu $(CHECK_ARGS)

lint: $(READY_FOR_TESTS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/lint-imports
	$(BIN)/mypy

# The documentation as a site in build/site. A link that leads nowhere ends the build.
docs: $(READY)
	$(INSTALL) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf .venv build *.egg-info examples/quickstart/build examples/skills/build examples/real_model/build
