# Needs Python 3.10 or later with venv, and make. Each target does all of its own set-up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-crash lint docs test-native test-arm clean

demo: $(VENV)/ready
	$(BIN)/python samples/demo.py

test: $(VENV)/ready lint
	$(BIN)/python -m pytest

# The C++ kernels by themselves, with the compiler's checks of memory, arithmetic and threads.
SANITIZERS := address,undefined thread
NATIVE := $(wildcard runtime/native/*.cpp) tests/native/test_maxsim.cpp
KERNEL_FLAGS := -std=c++17 -O1 -g -pthread -ffp-contract=off

test-native: $(SANITIZERS:%=build/native/%)
	for program in $^; do $$program || exit 1; done

build/native/%: $(NATIVE) $(wildcard runtime/native/*.h)
	mkdir -p $(@D)
	$(CXX) $(KERNEL_FLAGS) -fsanitize=$* -fno-sanitize-recover=all $(NATIVE) -o $@

# The ARM kernels on this machine: needs g++-aarch64-linux-gnu and qemu-user.
test-arm: $(NATIVE) $(wildcard runtime/native/*.h)
	mkdir -p build/native
	aarch64-linux-gnu-g++ $(KERNEL_FLAGS) -static $(NATIVE) -o build/native/arm
	$$(command -v qemu-aarch64-static || command -v qemu-aarch64) build/native/arm

# Kills, failing disks, power cuts, flipped bytes, hostile files: the long runs. strace is used where it is installed.
test-crash: $(VENV)/ready
	CEMBED_CRASH=long $(BIN)/python -m pytest -rP tests/crash
	$(BIN)/python tests/fuzz_index.py --seconds 300

lint: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Writes the help texts into README.md; a test checks that they are the current ones.
docs: $(VENV)/ready
	$(BIN)/python docs/help.py

# torch first and pinned: the export extra asks for the same version.
$(VENV)/ready: pyproject.toml $(wildcard runtime/native/*.*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[export,dev]'
	touch $@

clean:
	rm -rf $(VENV) .demo build dist *.egg-info runtime/libmaxsim*
