# Each target is one line of a real command; `make help` lists them.
PYTHON ?= python3
TORCH ?= torch==2.13.0
RECORD := build/benchmarks/$(shell date +%Y-%m-%dT%H-%M)
SHELL := bash
.SHELLFLAGS := -o pipefail -c
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup demo test cuda-check gpu bench app lint format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/installed  ## virtual environment, torch and torchweld (editable) in .venv

demo: setup app  ## the main job: train, weld, quantize, export, classify in C++
	python examples/digits.py --weld build/app/weld

test: setup app  ## all tests: pytest, then ctest of the kernels under sanitizers
	pytest --numprocesses 2 --dist loadfile
	cmake --preset asan
	cmake --build --preset asan
	ctest --preset asan

cuda-check: setup  ## compile and link the CUDA half; no GPU needed
	.ci/cuda

gpu:  ## build, test and measure the CUDA half, on a machine with a GPU
	PYTHON=$(PYTHON) .ci/gpu --output build/gpu/out

bench: setup  ## compare with stock PyTorch and other engines, about an hour; figures too
	pip install --quiet --group peers
	python -m benchmarks --compile --output $(RECORD)
	python -m benchmarks conv_bn_relu models --malloc fresh --output $(RECORD)
	if /sbin/ldconfig -p 2> /dev/null | grep -q libtcmalloc; then \
	  python -m benchmarks models --case training --malloc tcmalloc --output $(RECORD); fi
	python -m benchmarks quantized_linear --capability avx2 --output $(RECORD)
	python examples/quantized_transformer.py | tee $(RECORD)/quantized_transformer.txt
	python examples/adamw_layouts.py --output $(RECORD)/losses
	python -m benchmarks.report $(RECORD)/*.csv --plot $(RECORD)/figures

app: build/app/weld  ## the C++ program, at build/app/weld

lint: setup  ## ruff, clang-format, mypy, via pre-commit
	pre-commit run --all-files --show-diff-on-failure

format: setup  ## rewrite the sources as lint wants them
	ruff check --fix . ; ruff format . ; git ls-files '*.cpp' '*.cu' '*.h' | xargs clang-format -i

clean:  ## remove what was built, keep .venv
	rm -rf build dist

.venv/torch: Makefile
	$(PYTHON) -m venv .venv
	pip install --quiet --upgrade pip
	pip install --quiet $(TORCH)
	touch $@

.venv/installed: .venv/torch pyproject.toml CMakeLists.txt $(shell find csrc -type f)
	pip install --quiet --group build --group dev
	TORCHWELD_WERROR=ON pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

build/app/weld: .venv/installed $(shell find libtorch_app -type f)
	cmake -S libtorch_app -B build/app -G Ninja -D CMAKE_BUILD_TYPE=Release \
	  -D CMAKE_PREFIX_PATH="$$(python -c 'import torchweld; print(torchweld.cmake_prefix_path)')"
	cmake --build build/app
