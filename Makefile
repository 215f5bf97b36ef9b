# Every target does its own set-up: it makes a virtual environment, puts PyTorch and the build tools into it, builds and
# installs the package from this tree, and does so again when a source has changed.
#
#   make demo             train a small flow on 1,000 images, four minutes on two cores; results in demo/
#   make test             the test suite
#   make test-isas        tests/ops again, under each lower instruction set that the processor has
#   make lint             formatters, linters, type checker
#   make bench            the solve against conv2d; results in benchmarks/results/
#   make gpu-check        everything that needs a GPU; results in benchmarks/results/
#   make docs             the documentation, in site/
#   make wheel            a wheel in dist/, which installs without a compiler
#   make clean            removes what the others made
#
#   PYTHON=python3.12     the interpreter that the environment is made with
#   VENV=folder           the environment; one that exists is used as it is. VENV= (empty): none, PYTHON itself is used
#   TORCH=torch==2.12.0   what to install where there is no PyTorch yet
#   RESUME=1, FRESH=1     make demo goes on from its checkpoint, or replaces it

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BUILD_TOOLS := "setuptools>=77" "pybind11>=2.12" ninja
HAS_BUILD_TOOLS := "import setuptools, pybind11, ninja; assert int(setuptools.__version__.split('.')[0]) >= 77"

python := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
pip := $(python) -m pip --disable-pip-version-check
# The hooks of pre-commit find their programs on the PATH.
export PATH := $(if $(VENV),$(abspath $(VENV))/bin:)$(PATH)

# An empty file for each finished step: a step that was interrupted has none, and is done again.
done := $(if $(VENV),$(VENV),build)/.inverse-flow
sources := setup.py pyproject.toml MANIFEST.in LICENSE README.md \
    $(shell find csrc src -type f ! -name '*.so' ! -name '*.pyc' ! -path '*.egg-info/*')
# A GPU that is lent for minutes has no time for a wait that never ends.
ifeq ($(MAKECMDGOALS),gpu-check)
  export NVCC_APPEND_FLAGS := $(NVCC_APPEND_FLAGS) -DINVERSE_FLOW_MOST_POLLS=16777216
endif

# What the build reads from the environment; see docs/installation.md.
settings := $(FORCE_CUDA)/$(CUDA_HOME)/$(TORCH_CUDA_ARCH_LIST)/$(NVCC_APPEND_FLAGS)/$(if $(findstring default,$(origin CXX)),,$(CXX))

.PHONY: demo test test-isas lint bench gpu-check docs wheel clean
.DELETE_ON_ERROR:

demo: $(done)/package $(done)/train
	$(python) -m inverse_flow.command.main train --data embedded --out demo $(if $(RESUME),--resume) $(if $(FRESH),--fresh)

test: $(done)/package $(done)/dev
	$(python) -m pytest -n auto --dist worksteal

# PyTorch's own kernels are held to the same instruction set, which it calls "default" where it is the least. What its
# compiler keeps is of one instruction set, and does not say of which.
test-isas: $(done)/package $(done)/dev
	set -e; for isa in $$($(python) -c 'import inverse_flow; info = inverse_flow.build_info(); \
	    print(*info["cpu_isas"][: info["cpu_isas"].index(info["cpu_isa"])])'); do \
	  echo "tests/ops with $$isa"; \
	  TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/inductor-$$isa INVERSE_FLOW_CPU_ISA=$$isa \
	    ATEN_CPU_CAPABILITY=$$(echo $$isa | sed s/portable/default/) $(python) -m pytest -n auto --dist worksteal --thorough tests/ops; \
	done

lint: $(done)/package $(done)/dev
	$(python) -m pre_commit run --all-files --show-diff-on-failure --color never

bench: $(done)/package
	$(python) benchmarks/layer.py --json benchmarks/results/layer.json

gpu-check: $(done)/package
	$(python) benchmarks/gpu_check.py

docs: $(done)/dev
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict

# PyTorch brings its own libraries and those of CUDA: they stay out.
# For the GPUs of other machines, so that of this one must not be seen.
wheel: $(done)/package $(done)/wheel
	rm -rf build/lib* build/bdist* build/wheel
	CUDA_VISIBLE_DEVICES= $(pip) wheel --no-build-isolation --no-deps --wheel-dir build/wheel .
	$(python) -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcud*' --wheel-dir dist build/wheel/*.whl

clean:
	rm -rf .venv build dist demo site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(done)/python:
	$(if $(VENV),$(pip) --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV))
	$(python) -c "import torch" 2>/dev/null || $(pip) install "$(TORCH)"
	$(python) -c $(HAS_BUILD_TOOLS) 2>/dev/null || $(pip) install $(BUILD_TOOLS)
	@mkdir -p $(@D) && touch $@

# Rewritten only when a setting has changed since the last build.
$(done)/settings: always
	@mkdir -p $(@D)
	@echo '$(settings)' | cmp -s - $@ || echo '$(settings)' > $@

# Object files are kept in build/temp* and compiled again only when needed; build/lib* would bring back modules that
# have been removed from the tree.
$(done)/package: $(done)/python $(done)/settings $(sources)
	rm -rf build/lib* build/bdist*
	$(pip) install --no-build-isolation .
	@touch $@

# The requirements of an extra.
$(done)/train $(done)/wheel $(done)/dev: pyproject.toml | $(done)/package
	$(pip) install "inverse-flow[$(@F)]"
	@touch $@

.PHONY: always
always:
