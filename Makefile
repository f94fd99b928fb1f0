# Needs Python 3.11 or later with venv, and make. Each target does all of its own set-up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all test-oldest test-crash lint docs test-native test-library test-arm fuzz fuzz-native fuzz-python wheels deb locks sbom clean

demo: $(VENV)/ready
	$(BIN)/python samples/demo.py

# All but the slowest tests, in two processes; the tests of a file share what its fixtures make, so they stay in one.
test: $(VENV)/ready lint
	$(BIN)/python -m pytest --doctest-modules runtime quantize scale serve cembed/*.py
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Those of tests/slow.txt too: graphs of every kind, and long runs.
test-all: $(VENV)/ready lint
	$(BIN)/python -m pytest --doctest-modules runtime quantize scale serve cembed/*.py
	$(BIN)/python -m pytest -n 2 --dist loadfile --all

# The same tests with the oldest versions of everything that pyproject.toml allows. Needs Python 3.11.
OLDEST := build/oldest

test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python tests/oldest.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet torch==2.13.0
	$(OLDEST)/bin/pip install --quiet --constraint $(OLDEST)/constraints.txt --editable '.[export,dev]'
	$(OLDEST)/bin/python -m pytest -n 2 --dist loadfile --all

# The C++ kernels by themselves, with the compiler's checks of memory, arithmetic and threads.
SANITIZERS := address,undefined thread
NATIVE := $(wildcard runtime/native/*.cpp) tests/native/test_maxsim.cpp
KERNEL_FLAGS := -std=c++17 -O1 -g -pthread -ffp-contract=off

test-native: $(SANITIZERS:%=build/native/%) $(SANITIZERS:%=build/attention/%) $(SANITIZERS:%=build/byte_product/%)
	for program in $^; do $$program || exit 1; done

build/native/%: $(NATIVE) $(wildcard runtime/native/*.h)
	mkdir -p $(@D)
	$(CXX) $(KERNEL_FLAGS) -fsanitize=$* -fno-sanitize-recover=all $(NATIVE) -o $@

define OPERATOR
build/$(1)/%: runtime/native/$(1).cpp runtime/native/$(1).h tests/native/test_$(1).cpp
	mkdir -p $$(@D)
	$$(CXX) $$(KERNEL_FLAGS) -fsanitize=$$* -fno-sanitize-recover=all $$(filter %.cpp,$$^) -o $$@
endef
$(foreach name,attention byte_product,$(eval $(call OPERATOR,$(name))))

# libcembed with the same checks, and valgrind's: needs what tests/test_libcembed.py needs, and valgrind.
LIBRARY := $(wildcard runtime/native/*.cpp runtime/native/lib/*.cpp runtime/native/lib/*.h runtime/native/include/*)
export CEMBED_ONNXRUNTIME ?= $(firstword $(wildcard $(CURDIR)/$(VENV)/lib/python3*/site-packages/onnxruntime/capi/libonnxruntime.so*))
WATCHED = build/watched/bundle build/watched/index

test-library: $(SANITIZERS:%=build/watched/%/program) build/watched/none/program build/watched/index
	for program in $(SANITIZERS:%=build/watched/%/program); do \
	    TSAN_OPTIONS=suppressions=tests/native/tsan.supp $$program $(WATCHED) 4 || exit 1; done
	valgrind --quiet --leak-check=full --errors-for-leak-kinds=definite --error-exitcode=1 \
	    --suppressions=tests/native/valgrind.supp build/watched/none/program $(WATCHED) 2

build/watched/%/program: $(LIBRARY) tests/native/library.cpp
	mkdir -p $(@D)
	$(CXX) $(KERNEL_FLAGS) $(if $(filter none,$*),,-fsanitize=$* -fno-sanitize-recover=all) -DCEMBED_VERSION='""' \
	    $(INCLUDES) $(filter %.cpp,$^) -lcrypto -lz -ldl -o $@

# Where ONNX Runtime's headers may be, below $ONNXRUNTIME_ROOT.
INCLUDES = $(addprefix -I$(or $(ONNXRUNTIME_ROOT),/usr)/,include include/onnxruntime usr/include/onnxruntime)

build/watched/bundle: $(VENV)/ready
	$(BIN)/cembed export --backbone qwen2.5-vl --model tests/golden/causalqwen2_5 --out $@ --force

build/watched/index: build/watched/bundle
	$(BIN)/cembed index add $@ tests/golden/*/*.png --bundle $<

# Everything that reads what others wrote, for FUZZ_SECONDS each. libFuzzer over libcembed and libpictures: needs clang.
CLANG ?= clang++
FUZZ_SECONDS ?= 600
FUZZERS := $(patsubst tests/native/fuzz_%.cpp,build/fuzz/%,$(wildcard tests/native/fuzz_*.cpp))
ENGINE := $(addprefix runtime/native/lib/,engine.cpp embedder.cpp state.cpp capi.cpp)
PICTURES := $(wildcard runtime/native/pictures/*.cpp)
FUZZED := $(patsubst %.cpp,build/fuzz/%.o,$(filter-out $(ENGINE),$(filter %.cpp,$(LIBRARY))) $(PICTURES))

fuzz: fuzz-python fuzz-native

fuzz-native: $(FUZZERS)
	for name in $(notdir $^); do mkdir -p build/fuzz/$${name}_corpus; \
	    build/fuzz/$$name -artifact_prefix=build/fuzz/ -max_total_time=$(FUZZ_SECONDS) \
	    build/fuzz/$${name}_corpus tests/native/seeds/$$name || exit 1; done

# The same in Python, by coverage where atheris is installed in $(VENV).
fuzz-python: $(VENV)/ready
	$(BIN)/python tests/fuzz_index.py --seconds $(FUZZ_SECONDS)
	for name in $(notdir $(wildcard tests/fuzz/corpus/*)); do \
	    $(BIN)/python tests/fuzz/run.py $$name --seconds $(FUZZ_SECONDS) || exit 1; done

build/fuzz/%: build/fuzz/tests/native/fuzz_%.o $(FUZZED)
	$(CLANG) -fsanitize=fuzzer,address,undefined $^ -lcrypto -lz -o $@

build/fuzz/%.o: %.cpp $(filter %.h,$(LIBRARY)) $(wildcard runtime/native/*.h runtime/native/pictures/*.h)
	mkdir -p $(@D)
	$(CLANG) $(KERNEL_FLAGS) -fsanitize=fuzzer,address,undefined -c $< -o $@

# The ARM kernels on this machine: needs g++-aarch64-linux-gnu and qemu-user.
test-arm: $(NATIVE) $(wildcard runtime/native/*.h)
	mkdir -p build/native
	aarch64-linux-gnu-g++ $(KERNEL_FLAGS) -static $(NATIVE) -o build/native/arm
	$$(command -v qemu-aarch64-static || command -v qemu-aarch64) build/native/arm

# Kills, failing disks, power cuts, flipped bytes, hostile files: the long runs. strace is used where it is installed.
test-crash: $(VENV)/ready
	CEMBED_CRASH=long $(BIN)/python -m pytest -rP --all tests/crash
	$(BIN)/python tests/fuzz_index.py --seconds 300

lint: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The sdist and the wheels, twice, to see that they are the same; the Debian packages. Into dist/; docs/packages.md says more.
TOOLS := build/packages/tools

wheels: $(TOOLS)/ready
	$(TOOLS)/bin/python packaging/wheels.py --check

deb: $(TOOLS)/ready
	$(TOOLS)/bin/python packaging/deb.py

# requirements/*.txt, as pyproject.toml asks now; UPGRADE=--upgrade for the newest versions.
locks: $(TOOLS)/ready
	$(TOOLS)/bin/python packaging/lock.py $(UPGRADE)

# One CycloneDX file beside each wheel and package in dist/.
sbom: $(TOOLS)/ready
	$(TOOLS)/bin/python packaging/sbom.py

$(TOOLS)/ready: requirements/build.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --only-binary :all: --require-hashes --requirement $<
	touch $@

# Writes the help texts into docs/cli.md, and the site into build/site; a test checks that both are right.
docs: $(VENV)/ready
	$(BIN)/python docs/help.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# torch first and pinned: the export extra asks for the same version.
$(VENV)/ready: pyproject.toml $(wildcard runtime/native/*.cpp runtime/native/*.h runtime/native/pictures/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[export,dev]'
	touch $@

clean:
	rm -rf $(VENV) .demo build dist *.egg-info runtime/scoring/libmaxsim* runtime/pages/pdf/libpictures* runtime/engines/liboperators*
