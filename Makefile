# one4d_pl: `make` prints the targets.

PYTHON ?= python3
VENV ?= .venv

STAMP := $(VENV)/.setup-stamp
# the stamp keeps the index that torch came from; with another one torch is installed again, of the same version
TORCH_CAME_FROM := $(shell cat $(STAMP) 2>/dev/null)
TORCH_INDEX ?= $(TORCH_CAME_FROM)
ifneq ($(TORCH_INDEX),$(TORCH_CAME_FROM))
.PHONY: $(STAMP)
REINSTALL_TORCH := --force-reinstall
endif
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# what open3d's shared library links to besides libc
SYSTEM_PACKAGES := libusb-1.0-0 libegl1 libgl1 libx11-6
# where the viewer is tested; Debian's name, other systems may have none (the tests are skipped then)
BROWSER_PACKAGE := chromium
# a SLURM for the tests' virtual cluster
SLURM_PACKAGES := slurm-wlm munge
APT := export DEBIAN_FRONTEND=noninteractive; apt-get -qq update && apt-get -qq install -y --no-install-recommends
INSTALL_SYSTEM = $(APT) $(SYSTEM_PACKAGES) && { $(APT) $(BROWSER_PACKAGE) || echo "setup-system: no $(BROWSER_PACKAGE): the browser tests are skipped"; }

.DEFAULT_GOAL := help
.PHONY: help setup setup-system slurm-setup slurm-test demo eval nano test test-long test-elsewhere bench bench-gpu gpu-proof chaos docs docs-tables lint types clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  variables: PYTHON=$(PYTHON) (3.11-3.13)  VENV=$(VENV)  TORCH_INDEX=$(TORCH_INDEX) (a pip index for torch alone, e.g. PyTorch's CPU builds)"

setup: $(STAMP)  ## create VENV with the tested versions; does nothing when it is up to date

# torch comes first and alone: it is the only package that TORCH_INDEX concerns, and a later resolve then keeps it
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
		|| { echo "setup: $(PYTHON) is not Python 3.11-3.13; name one: make setup PYTHON=python3.12"; exit 1; }
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@echo "setup: torch"
	@$(PIP) install -q -c constraints.txt $(REINSTALL_TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@echo "setup: one4d_pl and its dependencies"
	@$(PIP) install -q -c constraints.txt -e '.[dev]'
	@echo "setup: viser"
	@{ $(PIP) install -c constraints.txt -e '.[viz]' && $(VENV)/bin/python -c 'import viser'; } >$(VENV)/viser.log 2>&1 \
		|| echo "setup: no viser ($$(tail -n 1 $(VENV)/viser.log)): no 3-D viewer, all else works"
	@echo "setup: open3d"
	@if ! $(PIP) install -c constraints.txt -e '.[open3d]' >$(VENV)/open3d.log 2>&1; then \
		echo "setup: open3d cannot be installed (no wheel for this system and Python? see $(VENV)/open3d.log): no points in TensorBoard, all else works"; \
	elif ! $(VENV)/bin/python -c 'import open3d' >$(VENV)/open3d.log 2>&1; then \
		echo "setup: open3d cannot be imported ($$(tail -n 1 $(VENV)/open3d.log)): no points in TensorBoard, all else works; make setup-system may help"; fi
	@echo "$(TORCH_INDEX)" >$@

setup-system:  ## install what open3d links to, and Chromium for the viewer's tests (apt-get, as root or with sudo)
	@if dpkg -s $(SYSTEM_PACKAGES) $(BROWSER_PACKAGE) >/dev/null 2>&1; then echo "setup-system: all there"; \
	elif ! command -v apt-get >/dev/null; then echo "setup-system: no apt-get here; for points in TensorBoard install libusb-1.0, EGL, GL and X11 yourself"; \
	elif [ "$$(id -u)" -eq 0 ]; then $(INSTALL_SYSTEM); \
	elif sudo -n true 2>/dev/null; then sudo -n sh -c '$(INSTALL_SYSTEM)'; \
	else echo "setup-system: needs root; for points in TensorBoard run as root: apt-get install $(SYSTEM_PACKAGES)"; fi

slurm-setup:  ## install the SLURM of the tests' virtual cluster (Debian's, by apt-get, as root)
	@if command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null; then echo "slurm-setup: all there"; \
	elif [ "$$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then $(APT) $(SLURM_PACKAGES); \
	else echo "slurm-setup: needs root and apt-get (packages: $(SLURM_PACKAGES)); without them the SLURM tests are skipped"; fi

# the first line is the command of every scale; it goes on from the shipped adapters, so that training is seen to work
demo: $(STAMP)  ## train on a little from the shipped adapters, then sample, measure and draw held-out scenes into demo/
	$(VENV)/bin/python -m one4d_pl.fit --config configs/demo.yaml
	$(VENV)/bin/python -m one4d_pl demo --out demo

BENCH ?= toy tasks
ROOT ?=
CKPT ?=
EVAL_ARGS ?=
eval: $(STAMP)  ## BENCH=sintel ROOT=<its folder> CKPT=<adapter folder>; with nothing: the demo adapters on toy scenes, and beside their goals
	@set -e; for bench in $(BENCH); do echo "eval: $$bench"; \
		OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/python -m one4d_pl evaluate --bench $$bench $(if $(ROOT),--root $(ROOT)) $(if $(CKPT),--ckpt $(CKPT)) $(EVAL_ARGS); done

# a process per core, four at most; a file's tests stay together, since they share what they set up
# a test that the hang guard ended takes its process along, and xdist would wait for that file for ever: no restarts
test: $(STAMP)  ## the tests but the slow ones
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/python -m pytest -q -m "not slow" -n logical --maxprocesses 4 --dist loadfile --max-worker-restart=0

test-long: $(STAMP)  ## the slow tests
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/python -m pytest -q -m slow -o faulthandler_timeout=1800

test-elsewhere: $(STAMP)  ## a quick selection as an ordinary user, in a folder with a space, on a processor without AVX-512
	$(VENV)/bin/python -m tests.elsewhere

slurm-test: $(STAMP)  ## everything that can befall a job, on a virtual cluster of eight nodes; an hour or two
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/python -m tests.slurm_lab.proof $(SLURM_TEST_ARGS)

bench: $(STAMP)  ## on a CPU: coupling beside its alternatives, a step before and after, the writer beside its limit
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONPATH=. $(VENV)/bin/python tests/models/benchmark_coupling.py
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONPATH=. $(VENV)/bin/python tests/models/benchmark_step.py
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONPATH=. $(VENV)/bin/python tests/data_prep/benchmark_throughput.py

NANO_ARGS ?=
nano: $(STAMP)  ## ten of the paper's claims at laptop scale: 17 trainings, a report in runs/nano; 9 core-hours, resumable
	OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/python -m experiments.nano $(NANO_ARGS)

BENCH_GPU_ARGS ?=
bench-gpu: $(STAMP)  ## a training step of the 14B and the 1.3B at random on this GPU; BENCH_GPU_ARGS=--tiny runs on a CPU
	$(VENV)/bin/python -m experiments.bench_gpu $(BENCH_GPU_ARGS)

GPU_PROOF_ARGS ?=
gpu-proof: $(STAMP)  ## everything once on one GPU in ten minutes, with a report; GPU_PROOF_ARGS=--tiny runs on a CPU
	$(VENV)/bin/python -m experiments.gpu_proof $(GPU_PROOF_ARGS)

chaos: $(STAMP)  ## KILLS=200: SIGKILL a 2-rank run again and again; survivors must equal the undisturbed one bit for bit
	PYTHONPATH=. $(VENV)/bin/python -m tests.training.chaos

# the variable silences Material's advertisement for its successor
docs: $(STAMP)  ## build the documentation into site/; a broken link is an error
	@$(VENV)/bin/python -c 'import material' 2>/dev/null || $(PIP) install -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict
	@echo "docs: open site/index.html, or look at it with: $(VENV)/bin/mkdocs serve"

docs-tables: $(STAMP)  ## make the tables of README and docs/ again that the code knows
	$(VENV)/bin/python -m docs.tables

lint: $(STAMP)  ## ruff: rules and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(STAMP)  ## mypy on the package, data_prep, experiments and docs
	$(VENV)/bin/mypy

clean:  ## remove build products and caches; VENV, runs and data stay
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find one4d_pl data_prep docs experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +
