# `make demo` and `make test` set everything up by themselves, in a virtual environment of their own, and are quick the
# second time.

# What is tested against. Where this installs a larger build than wanted (CUDA packages are several GB), name another:
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# For the tests alone, and without their dependencies: any torch will do. The networks of other libraries (5 MB to download)
# that `convert` knows:
TORCHVISION ?= torchvision==0.28.0
LIBRARIES ?= timm==1.0.31 monai==1.6.1 pytorchcv==0.0.74
PYTHON ?= python3
VENV ?= .venv
# Where `make gpu` leaves its results, which of its parts run, and of which networks.
OUT ?= build/gpu
PART ?= test kernels models profile
MODEL ?= densenet121
# Passed on to the program that a target runs: make demo ARGS="--epochs 2", make test ARGS="-k dense -x".
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install -qq
torch_key := $(shell printf %s '$(TORCH)' | tr -c 'A-Za-z0-9.' _)

# The native code is built beside the installation of what it is tested with.
MAKEFLAGS += --jobs=2

.DELETE_ON_ERROR:
.PHONY: help demo test build bench tables wheel gpu gpu-test gpu-kernels gpu-models gpu-profile clean

help:
	@echo "make demo    set up, then train a DenseNet twice, stock and converted, and compare (about 3 minutes)"
	@echo "make test    set up, then run the tests that need no GPU and are not slow"
	@echo "make build   set up and build the native code in place"
	@echo "make bench   run the benchmarks of blocks and networks (rows go to benchmarks/results), then of every operation"
	@echo "make tables  write the README's measured tables from the rows in benchmarks/results"
	@echo "make wheel   build a wheel into dist/"
	@echo "make gpu     on a machine with a GPU: build, test and benchmark with PYTHON as it is (no environment is made);"
	@echo "             in parts of at most nine minutes: make gpu PART=test, PART=kernels, PART=models MODEL=\"densenet201 resnet50\","
	@echo "             PART=profile"
	@echo "make clean   remove what was built (not $(VENV))"
	@echo "Variables: TORCH='$(TORCH)' PYTHON=$(PYTHON) VENV=$(VENV) ARGS='$(ARGS)'"

demo: $(VENV)/.demo $(VENV)/.built
	$(PY) -m resdense_ext demo $(ARGS)

test: $(VENV)/.test $(VENV)/.built
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not slow" $(ARGS)

build: $(VENV)/.built

bench: $(VENV)/.test $(VENV)/.built
	@set -e; for file in bench_dense_block bench_densenet; do $(PY) benchmarks/$$file.py $(ARGS); done
	$(PY) -m pytest benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds

tables: $(VENV)/.test
	$(PY) benchmarks/_tables.py

wheel: $(VENV)/.torch-$(torch_key)
	@rm -rf build/lib* build/bdist*
	@$(PY) -m pip --disable-pip-version-check wheel -q --no-build-isolation --no-deps -w dist .
	@ls -l dist/*.whl

# On a machine with a GPU: PYTHON as it is, no environment is made. A part ends within nine minutes; a second run of a part
# goes on with what is missing, and one that fails stops no other. $(OUT) gets at most 8 files, a table comes last.
gpu:
	@$(PYTHON) -c 'import torch, sys; torch.cuda.is_available() or sys.exit(1)' 2>/dev/null || { \
		echo "make gpu needs a CUDA device, and torch with CUDA in PYTHON=$(PYTHON): torch.cuda.is_available() is not True"; exit 2; }
	@mkdir -p $(OUT)
	@# For this card alone, unless said otherwise: a third of the time.
	@TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$$($(PYTHON) -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}" \
		timeout 240 $(PYTHON) setup.py -q build_ext --inplace >$(OUT)/build.log 2>&1 || { tail -n 40 $(OUT)/build.log; exit 1; }
	@failed=; for part in $(PART); do $(MAKE) --no-print-directory gpu-$$part || failed="$$failed $$part"; done; \
		test -z "$$failed" || { echo "make gpu: failed:$$failed"; exit 1; }

# Most of the time is Triton's compiler, of which every process has its own; the file has the results until the time is up.
gpu-test:
	@rm -f $(OUT)/failed; processes=$$($(PYTHON) -c 'import xdist' 2>/dev/null && echo "-n 8"); \
		timeout -s INT -k 10 260 $(PYTHON) -m pytest -v --tb=short $$processes --continue-on-collection-errors -m gpu $(ARGS) >$(OUT)/tests.txt 2>&1 || touch $(OUT)/failed
	@tail -n 60 $(OUT)/tests.txt | cut -c1-200
	@# Every tensor is an allocation of its own, beyond which a kernel does not get unseen.
	@if command -v compute-sanitizer >/dev/null; then \
		for tool in memcheck racecheck; do \
			echo "compute-sanitizer --tool $$tool"; \
			PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 50 compute-sanitizer --tool $$tool --kernel-name kns=resdense --error-exitcode 1 \
				$(PYTHON) tests/sanitize.py; \
			case $$? in 0) ;; 124) echo "stopped after 50 s";; *) touch $(OUT)/failed;; esac; \
		done >$(OUT)/sanitizer.txt 2>&1; tail -n 5 $(OUT)/sanitizer.txt; \
		! grep -m 5 -E '^=+ (Invalid|Error|Program hit)' $(OUT)/sanitizer.txt || touch $(OUT)/failed; \
	else echo "compute-sanitizer is not installed: left out"; fi
	@test ! -e $(OUT)/failed || { rm $(OUT)/failed; echo "make gpu: tests or the sanitizer failed, see above"; exit 1; }

gpu-kernels:
	@PYTHONPATH=. timeout -s INT -k 10 530 $(PYTHON) benchmarks/bench_kernels.py --seconds 420 --out $(OUT) $(ARGS)

gpu-models:
	@PYTHONPATH=. timeout -s INT -k 10 530 $(PYTHON) benchmarks/bench_models.py --seconds 420 --model $(MODEL) --out $(OUT) $(ARGS)

gpu-profile:
	@PYTHONPATH=. timeout -s INT -k 10 120 $(PYTHON) benchmarks/bench_profile.py --model $(MODEL) --out $(OUT) $(ARGS)

clean:
	rm -rf build dist *.egg-info resdense_ext/*.so $(VENV)/.built

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "PYTHON=$(PYTHON): expected Python 3.10 or later, got $$($(PYTHON) -V 2>&1)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "PYTHON=$(PYTHON) cannot make a virtual environment (on Debian and Ubuntu: install python3-venv)"; exit 1; }

# The name holds the version, so that another TORCH is installed and built against.
$(VENV)/.torch-$(torch_key): | $(VENV)/bin/python
	@echo "Installing $(TORCH) into $(VENV)"
	@$(PIP) "setuptools>=77" wheel ninja numpy
	@$(PIP) $(TORCH)
	@rm -f $(VENV)/.torch-* && touch $@

# Editable, and without native code: the dependencies and the `resdense` command.
$(VENV)/.demo: $(VENV)/.torch-$(torch_key) pyproject.toml
	@RESDENSE_SKIP_EXT=1 $(PIP) --no-build-isolation -e ".[demo]"
	@touch $@

$(VENV)/.test: $(VENV)/.torch-$(torch_key) pyproject.toml Makefile
	@RESDENSE_SKIP_EXT=1 $(PIP) --no-build-isolation -e ".[demo,test]"
	@$(PIP) --no-deps $(TORCHVISION) $(LIBRARIES)
	@touch $@

$(VENV)/.built: $(VENV)/.torch-$(torch_key) setup.py $(shell find csrc -type f)
	@mkdir -p build
	@$(PY) setup.py build_ext --inplace >build/build.log 2>&1 || { cat build/build.log; exit 1; }
	@grep '^resdense_ext: ' build/build.log
	@touch $@
