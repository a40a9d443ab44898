# Two commands do everything on a fresh machine: `make demo` and `make test`. Both set up .venv first.
#
#   TORCH=...  what to install as torch, default torch==2.13.0; TORCH= keeps the one that PYTHON has
#   PYTHON=... the interpreter that .venv is made from
#   PY=...     run with this interpreter as it is (for example on a machine with a GPU): no set-up

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
TRITON36 := .triton36
VISION := .vision
DIST := .dist

ifdef PY
READY :=
DOCS_READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs
endif

PYTEST := $(PY) -m pytest -q
# Tests run in two processes of one thread each: quicker, and no threads that wait for each other.
PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) -n 2

CXX_FILES := $(wildcard csrc/*/*.[ch]* tests/cuda_host/*.h tests/cuda_host/*.cpp tests/aarch64/*.cpp benchmarks/*.cpp)

.PHONY: help setup demo test test-all test-gpu test-vision sanitize lint dist check-installs check-cuda check-cuda-quick check-triton check-triton-quick check-quack check-aarch64 bench bench-report experiments docs clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(READY) ## make .venv with torch and everything the targets need

demo: $(READY) ## train CE, NormFace, NTCE, NONL and SupCon on digits; table and out/demo/demo.png
	$(PY) -m nckernels demo --out out/demo

test: $(READY) $(TRITON36)/.ready ## lint, types, offline compilation of GPU kernels, all quick tests; ten minutes
	$(MAKE) --jobs 2 --output-sync lint check-cuda-quick check-triton-quick
	$(PARALLEL) tests --ignore tests/interpreter -m "not slow and not cuda"
	TRITON_INTERPRET=1 $(PARALLEL) tests/interpreter -m "not slow and not cuda"

test-all: lint check-cuda check-triton check-quack check-aarch64 ## everything, the slow tests and every combination of parameters too
	$(PARALLEL) tests --ignore tests/interpreter -m "not cuda" --full-grid
	TRITON_INTERPRET=1 $(PARALLEL) tests/interpreter -m "not cuda" --full-grid

test-gpu: $(READY) ## the tests that need a CUDA device (make test-gpu PY=python3); TEST_SECONDS=... for as many as fit
	$(PYTEST) tests --ignore tests/interpreter --ignore tests/cuda_host --continue-on-collection-errors -m cuda --full-grid \
	  $(addprefix --seconds=,$(TEST_SECONDS))

sanitize: $(READY) ## the native backend's tests under the address and undefined-behaviour sanitizers
	NCKERNELS_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1" \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 NCKERNELS_BACKEND=native \
	$(PYTEST) tests/test_primitive.py tests/test_losses.py tests/test_autograd.py tests/test_native.py tests/test_fuzz.py \
	  $(addprefix tests/test_contrastive,.py _autograd.py _degenerate.py _modules.py) -k native --full-grid

test-vision: $(VISION)/.ready ## with torchvision, timm and the examples' frameworks, under a newer torch (6.2 GB): examples, and our own tests
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VISION)/bin/python -m pytest -q -n 2 tests/train tests/lab tests/examples \
	  $(addprefix tests/test_,primitive.py losses.py autograd.py modules.py native.py integration.py) -m "not slow and not cuda"

lint: $(READY) ## ruff, mypy and clang-format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -c "from clang_format import clang_format; clang_format()" --dry-run -Werror $(CXX_FILES)

check-cuda: $(READY) ## compile every CUDA kernel for sm_80 and sm_90a, no GPU needed
	$(PY) tools/check_cuda.py

check-cuda-quick: $(READY) ## the same for sm_90a, from which sm_80 differs in csrc/cuda/hopper.h only
	$(PY) tools/check_cuda.py --quick

check-triton: $(READY) $(TRITON36)/.ready ## compile every Triton kernel for sm_80, sm_90 and sm_100, no GPU needed
	$(PY) tools/check_triton.py
	PYTHONPATH=$(TRITON36) $(PY) tools/check_triton.py

check-triton-quick: $(READY) $(TRITON36)/.ready ## the same for one specialisation of each kernel; the oldest Triton for sm_90
	$(PY) tools/check_triton.py --quick
	PYTHONPATH=$(TRITON36) $(PY) tools/check_triton.py --quick --arch 90

check-quack: $(READY) ## compile quack's product with our epilogues for sm_90a, sm_100a and sm_120a, where quack is there
	$(PY) tools/check_quack.py

check-aarch64: $(READY) ## the CPU kernels against float64 loops, here and on aarch64 under emulation, two minutes
	$(PY) tools/check_aarch64.py

dist: $(DIST)/.ready ## sdist and manylinux wheel in dist/, checked (twine, check-wheel-contents, auditwheel); a few minutes
	$(DIST)/bin/python tools/dist.py
	$(DIST)/bin/cffconvert --validate

# INSTALLS=... are options of the script, for example INSTALLS="--only 3.13".
check-installs: ## install what make dist made with each Python and torch (15 GB of downloads) and print a table
	$(PYTHON) tools/check_installs.py $(INSTALLS)

bench: $(READY) ## forward + backward of every loss on this machine, half a minute (pytest-benchmark)
	@mkdir -p out
	$(PYTEST) benchmarks/bench_losses.py --benchmark-json out/benchmark.json --benchmark-columns median,iqr,rounds

bench-report: $(READY) ## the quick suite with all rivals, three minutes: JSON and pictures in out/benchmarks
	$(PY) -m benchmarks --suite quick --out out/benchmarks

experiments: $(READY) ## the papers' claims on glyphs: trains what is missing in out/experiments, writes docs/results.md
	OMP_NUM_THREADS=1 $(PY) -m benchmarks experiments --out out/experiments --write

docs: $(DOCS_READY) ## the documentation in out/docs, a page out/docs/index.html; any warning is an error
	$(PY) -m sphinx -q -W --keep-going -n -d out/doctrees docs out/docs

clean: ## remove everything that make and the tools produced
	rm -rf $(VENV) $(TRITON36) $(VISION) $(DIST) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

$(VENV)/.ready: pyproject.toml setup.py
	$(PYTHON) -m venv $(if $(TORCH),,--system-site-packages) $(VENV)
	$(VENV)/bin/pip install -q --upgrade pip setuptools
	$(if $(TORCH),$(VENV)/bin/pip install -q $(TORCH))
	$(VENV)/bin/pip install -q --editable ".[dev]"
	@touch $@

# Sphinx and its theme, for `make docs` alone.
$(VENV)/.docs: $(READY)
	$(PY) -m pip install -q --editable ".[docs]"
	@touch $@

# The oldest Triton that we support (torch 2.11 ships it), beside the newest one in .venv.
$(TRITON36)/.ready: $(READY)
	$(PY) -m pip install -q --target $(TRITON36) triton==3.6.0 "numpy<2.4"
	@touch $@

# torchvision, which has no build beside the CPU's torch in .venv, and the frameworks of the examples.
$(VISION)/.ready: pyproject.toml setup.py
	$(PYTHON) -m venv $(VISION)
	$(VISION)/bin/pip install -q --upgrade pip setuptools
	$(VISION)/bin/pip install -q torch==2.14.1 torchvision==0.29.1 timm
	$(VISION)/bin/pip install -q --editable ".[dev,examples]"
	@touch $@

# What builds and checks distributions; it needs no torch.
$(DIST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(DIST)
	$(DIST)/bin/pip install -q --upgrade pip
	$(DIST)/bin/pip install -q --group dist
	@touch $@
