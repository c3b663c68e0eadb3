# SPDX-License-Identifier: Apache-2.0
# Every target sets up what it needs, once. `make help` says what there is.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=
GPU_PYTHON ?= python3
RESULTS ?= build/gpu
PARTS ?=
BUDGET ?=
GPU_PREBUILT ?=
WHEELS ?=
TORCH ?=
ARCH ?=

PY := $(VENV)/bin/python
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

# Tests, demo and benchmark run this checkout, whatever else the environment has installed.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help build wheel demo family test frameworks lint docs bench gpu gpu-build gpu-picture clean FORCE
.DEFAULT_GOAL := help

help:
	@echo "make demo     train with SGD, SAM, mSAM and F-SAM on real data: a table, and a picture in demo.png"
	@echo "make family   the demo for every method of the family, on MNIST-1D: a table, and a picture in family.png"
	@echo "make test     build, then run the tests; with ARGS='-m exhaustive' those that only CI needs"
	@echo "make frameworks   install Accelerate, transformers, Lightning and PEFT, and test with them; torch stays"
	@echo "make lint     style and types of the Python code, licence lines"
	@echo "make docs     the site, in build/site; a broken link or reference stops it"
	@echo "make bench    time the optimizer step against plain PyTorch: tables, and build/bench_*.csv and .png; with ARGS"
	@echo "              SAM and F-SAM only"
	@echo "make gpu      on a machine with a CUDA GPU: build, test, sanitize and time everything there, without a network"
	@echo "make gpu-build    with PYTHON, TORCH and ARCH: the extension for that Python, torch and GPU, on a machine without one"
	@echo "make gpu-picture  the README's picture of what was measured on a GPU, from benchmarks/results"
	@echo "make build    build the C++ kernels in place"
	@echo "make wheel    a wheel for this Python and torch, and an archive of the sources, in build/wheels"
	@echo "make clean    remove what was built; the environment stays (rm -rf .venv)"
	@echo
	@echo "PYTHON=python3.12       the Python (3.10 to 3.13) that the environment is made with; default: python3"
	@echo "VENV=/path              the environment; default: .venv. One that exists already keeps what it has: its own"
	@echo "                        torch is used, and only packages that are absent are added"
	@echo "MSAM_KERNELS_CPP=0      leave the C++ kernels out; =1: stop if there is no compiler"
	@echo "MSAM_KERNELS_STABLE=1   build and wheel: the kernels for every Python and torch from 2.10 on, alone; =0: without them"
	@echo "MSAM_KERNELS_ISA=baseline   (or avx2, avx512) the CPU kernels' instruction set; default: the processor's widest"
	@echo "ARGS='...'              options for the command behind demo, family, test, bench and gpu"
	@echo "JOBS=2                  test processes"
	@echo "GPU_PYTHON=python3      whose torch, nvcc, ninja, pybind11 and pytest make gpu uses; it installs nothing"
	@echo "RESULTS=build/gpu       where make gpu leaves logs, measurements and summary.md"
	@echo "PARTS='build test'      parts of make gpu (PARTS=list names them); default: all, each in at most 8 minutes"
	@echo "BUDGET=840              seconds for all parts of make gpu together, the most telling first; ARGS=--plan: what for"
	@echo "GPU_PREBUILT=/path      for make gpu: what make gpu-build made, instead of building"
	@echo "TORCH=2.11.0 ARCH=9.0   for make gpu-build: torch's version, and the GPU's compute capability"
	@echo "WHEELS=/path            wheels for make gpu of pure Python packages that GPU_PYTHON lacks"
	@echo "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu    a smaller torch, for Linux without a GPU"

demo: build
	"$(PY)" examples/demo.py $(ARGS)

family: build
	"$(PY)" examples/methods.py $(ARGS)

# One thread for each process unless a test asks for more, and idle threads sleep: the processes share the cores.
test: build
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive "$(PY)" -m pytest -n $(JOBS) -m "not exhaustive" $(ARGS)

# Without what the packages ask for: torch is the environment's, and the rest of it stands in the file.
frameworks: build
	"$(PY)" -m pip install -q --no-deps -r requirements-frameworks.txt
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive "$(PY)" -m pytest -n $(JOBS) tests/test_frameworks.py $(ARGS)

lint: build/environment
	"$(PY)" -m ruff check .
	"$(PY)" -m ruff format --check .
	"$(PY)" -m mypy
	@missing=$$(grep -L 'SPDX-License-Identifier: Apache-2.0' $(LICENSED)); \
	test -z "$$missing" || { echo "no SPDX-License-Identifier: Apache-2.0 in:" $$missing >&2; exit 1; }

# An environment of its own: what draws the site has nothing to do with what is described.
DOCS := build/docs-environment
docs: $(DOCS)/done
	NO_MKDOCS_2_WARNING=1 "$(DOCS)/bin/python" -m mkdocs build -q

$(DOCS)/done: requirements-docs.txt
	"$(PYTHON)" -m venv "$(DOCS)"
	"$(DOCS)/bin/pip" install -q -r requirements-docs.txt
	touch "$@"

LICENSED = Makefile setup.py pyproject.toml requirements-dev.txt requirements-docs.txt requirements-frameworks.txt mkdocs.yml .ci/run \
	$(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*) \
	$(wildcard msam_kernels/*.py msam_kernels/*/*.py tests/*.py benchmarks/*.py examples/*.py docs/*.py)

bench: build
	"$(PY)" benchmarks/bench_step.py --csv build/bench_step.csv --plot build/bench_step.png $(ARGS)
	$(if $(ARGS),,"$(PY)" benchmarks/bench_family.py --csv build/bench_family.csv)

# No environment of ours: the machine's own torch is what has to work.
gpu:
	@command -v "$(GPU_PYTHON)" >/dev/null || { echo "GPU_PYTHON=$(GPU_PYTHON) is not there: name the Python that has" \
	  "torch with CUDA" >&2; exit 1; }
	@"$(GPU_PYTHON)" -c 'from importlib.metadata import version; version("torch")' 2>/dev/null || { echo "$(GPU_PYTHON) has no torch: name the Python that has it" \
	  "with GPU_PYTHON=/path/to/python3" >&2; exit 1; }
	"$(GPU_PYTHON)" benchmarks/gpu.py --results "$(RESULTS)" $(if $(BUDGET),--budget "$(BUDGET)") \
	  $(if $(GPU_PREBUILT),--prebuilt "$(GPU_PREBUILT)") $(if $(WHEELS),--wheels "$(WHEELS)") --parts $(PARTS) $(ARGS)

# An environment of its own, with a torch that has CUDA: what is built there meets the same torch where the GPU is.
GPU_BUILD := build/gpu-build/$(notdir $(PYTHON))-torch-$(TORCH)

gpu-build:
	@test -n "$(TORCH)" -a -n "$(ARCH)" || { echo "say for which torch and which GPU, e.g. make gpu-build" \
	  "PYTHON=python3.12 TORCH=2.11.0 ARCH=9.0; \`nvidia-smi --query-gpu=compute_cap --format=csv\` tells the last one" >&2; exit 1; }
	@command -v "$(PYTHON)" >/dev/null || { echo "PYTHON=$(PYTHON) is not there: it must be the version that is where the" \
	  "GPU is" >&2; exit 1; }
	"$(PYTHON)" -m venv "$(GPU_BUILD)/environment"
	"$(GPU_BUILD)/environment/bin/python" -m pip install -q "torch==$(TORCH)" numpy ninja pybind11 setuptools wheel
	rm -rf "$(GPU_BUILD)/result"
	MSAM_KERNELS_CPP=1 FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="$(ARCH)" "$(GPU_BUILD)/environment/bin/python" setup.py -q \
	  build_ext --build-lib "$(GPU_BUILD)/result" --build-temp "$(GPU_BUILD)/objects"
	@"$(GPU_BUILD)/environment/bin/python" benchmarks/prebuilt.py "$(GPU_BUILD)/result"

gpu-picture: build/environment
	"$(PY)" benchmarks/gpu_tables.py --plot benchmarks/results/h200.png

build: build/extension

# Not done where the compiler was missing: the next make looks for it again.
build/extension: build/environment $(SOURCES)
	@touch $@.begun
	"$(PY)" setup.py -q build_ext --inplace
	@test -z "$$(ls msam_kernels/_C.* msam_kernels/_stable.* 2>/dev/null)" -a "$(MSAM_KERNELS_CPP)" != 0 || mv $@.begun $@

# From the archive: what is not in it does not get into the wheel either.
wheel: build/environment
	rm -rf build/wheels
	MSAM_KERNELS_CPP=0 "$(PY)" setup.py -q egg_info --egg-base build sdist --dist-dir build/wheels
	"$(PY)" -m pip wheel -q --no-build-isolation --no-deps --wheel-dir build/wheels build/wheels/*.tar.gz
	@ls build/wheels/*

clean:
	rm -rf build *.egg-info msam_kernels/_C.*so msam_kernels/_stable.*so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find csrc msam_kernels tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

# What the environment lacks. One that this Makefile made (msam_kernels.made) must have every pin; another one must only
# have every package: its versions are its owner's business, torch above all.
define LACKING
import platform, re, sys
from importlib.metadata import PackageNotFoundError, version
if sys.version_info < (3, 10):
    sys.exit(f"{sys.executable} is Python {sys.version.split()[0]}, and msam_kernels needs 3.10 or later: name another VENV")
made, lacking = sys.argv[1] == "made", []
for line in open("requirements-dev.txt"):
    pin = re.match(r"([\w.-]+)==([^\s;#]+)(?:; (?:python_version < \"3\.(\d+)\"|(sys_platform .*)))?", line)
    if not pin or (pin[3] and sys.version_info >= (3, int(pin[3]))):
        continue
    if pin[4] and not eval(pin[4], {"sys_platform": sys.platform, "platform_machine": platform.machine()}):
        continue
    try:
        fine = version(pin[1]).split("+")[0] == pin[2] or not made
    except PackageNotFoundError:
        fine = False
    if not fine:
        lacking.append(f"{pin[1]}=={pin[2]}")
print(*lacking)
endef
export LACKING

# For whom the extension is built: another environment, Python, torch or choice of kernels builds it again.
define IDENTITY
import os, sys
from importlib.metadata import version
print(sys.prefix, sys.version, version("torch"), *(os.environ.get(k) for k in (
    "CXX", "MSAM_KERNELS_CPP", "MSAM_KERNELS_STABLE", "MSAM_KERNELS_CUDA", "FORCE_CUDA", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST")))
endef
export IDENTITY

build/environment: FORCE
	@mkdir -p build
	@if [ -e "$(VENV)/msam_kernels.making" ] || [ ! -e "$(VENV)" ]; then \
	  command -v "$(PYTHON)" >/dev/null || { echo "PYTHON=$(PYTHON) is not there: install Python 3.10 to 3.13, or say" \
	    "which one with PYTHON=/path/to/python3" >&2; exit 1; }; \
	  "$(PYTHON)" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	    echo "$(PYTHON) is $$("$(PYTHON)" -V 2>&1), and the pinned packages are for Python 3.10 to 3.13: choose another" \
	    "with PYTHON=/path/to/python3, or an environment of your own with VENV=/path" >&2; exit 1; }; \
	  "$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) lacks the module venv: install it" \
	    "(Debian and Ubuntu: apt install python3-venv), or give an environment of your own with VENV=/path" >&2; exit 1; }; \
	  echo "making the environment $(VENV)"; \
	  mkdir -p "$(VENV)" && touch "$(VENV)/msam_kernels.making" && "$(PYTHON)" -m venv "$(VENV)" && \
	    mv "$(VENV)/msam_kernels.making" "$(VENV)/msam_kernels.made"; \
	fi
	@test -x "$(PY)" || { echo "VENV=$(VENV) is no Python environment, it has no bin/python: name another, or a path that" \
	  "does not exist to have one made" >&2; exit 1; }
	@made=$$(test ! -e "$(VENV)/msam_kernels.made" || echo made); \
	lacking=$$("$(PY)" -c "$$LACKING" "$$made") || exit 1; \
	case "$$made $$lacking " in \
	  "made  ") ;; \
	  made*) echo "installing requirements-dev.txt into $(VENV); the first time this takes minutes"; \
	    "$(PY)" -m pip install -q -r requirements-dev.txt || exit 1 ;; \
	  *" torch=="*) echo "VENV=$(VENV) has no torch: install the build that your machine needs there, for instance" \
	    "\`$(PY) -m pip install" $$(grep '^torch==' requirements-dev.txt)"\`, and run make again" >&2; exit 1 ;; \
	  "  ") ;; \
	  *) echo "adding to $(VENV) what it lacks: $$lacking"; "$(PY)" -m pip install -q --no-deps $$lacking || exit 1 ;; \
	esac; \
	if [ "$$made" ] && ! "$(PY)" -c 'from importlib.metadata import version; version("msam_kernels")' 2>/dev/null; then \
	  MSAM_KERNELS_CPP=0 "$(PY)" -m pip install -q --no-build-isolation --no-deps -e . || exit 1; \
	fi
	@"$(PY)" -c "$$IDENTITY" >$@.now && { cmp -s $@.now $@ || mv $@.now $@; rm -f $@.now; }
