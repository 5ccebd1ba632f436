# Two commands: `make demo` and `make test`. Both make .venv, install what they need and run; a second run reuses it.
#
#   PYTHON=python3.12        the Python to use (3.10 or newer)
#   TORCH_VERSION=2.11.0     the torch to install; the newest where it is not given
#   VENV=.venv               the virtual environment
#   MUDDFORMER_CUDA=OFF      AUTO (default), ON or OFF: CUDA kernels
#   EXTRA=test               the optional dependencies to install; smoke: those of `make smoke` alone

PYTHON ?= python3
TORCH_VERSION ?=
VENV ?= .venv
EXTRA ?= test
ifeq ($(origin CXX),default)
CXX := c++
endif

bin := $(VENV)/bin
# abspath would take a folder with spaces in its name for several.
here := $(if $(filter /%,$(VENV)),,$(CURDIR)/)
tag := $(shell $(PYTHON) -c 'import sys; print("python%d.%d" % sys.version_info[:2])')-torch-$(or $(TORCH_VERSION),newest)
ready := $(VENV)/.ready-$(tag)
installed := $(VENV)/.installed-$(tag)-$(EXTRA)
sources := setup.py pyproject.toml CMakeLists.txt $(shell find csrc muddformer -type f \
	-not -name '*.so' -not -name '*.pyc' -not -path 'muddformer/include/*' -not -path 'muddformer/share/*')
cmake_build = build/$(1)-$(tag)
cmake_jobs := $(shell $(PYTHON) -c 'import os; m = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"); print(max(1, min(os.cpu_count(), m >> 31)))')
# Each process of the tests has the threads of torch and, on a GPU, a context there.
test_jobs := $(shell $(PYTHON) -c 'print(min(4, $(cmake_jobs)))')

.PHONY: demo venv test test-python test-cpp tests-cpp smoke asan valgrind report quality quality-report docs doxygen lint format install clean gtest
.DELETE_ON_ERROR:

demo: $(installed)
	$(bin)/muddformer demo

test: test-cpp test-python

install: $(installed)

venv: $(ready)

# ---- set-up -----------------------------------------------------------------------------------------------------
$(ready):
	@if [ -e $(VENV) ] && ! ls $(VENV)/.ready-* >/dev/null 2>&1; then \
		echo "make: VENV=$(VENV) is there and was not made by this Makefile" >&2; exit 1; fi
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	touch $(VENV)/.ready-not-yet
	$(bin)/python -m pip install --quiet --upgrade pip
	$(bin)/python -m pip install --quiet "torch$(if $(TORCH_VERSION),==$(TORCH_VERSION))" "setuptools>=77" wheel cmake ninja nlohmann-json
	touch $@

$(installed): $(ready) $(sources)
	rm -rf build/lib* build/bdist*
	$(bin)/python -m pip install --quiet --no-build-isolation ".[$(EXTRA)]"
	@$(bin)/python -I -c 'import muddformer.utils as u; print("muddformer: CUDA kernels:", u.build_info()["CUDA kernels"])'
	touch $@

# ---- tests ------------------------------------------------------------------------------------------------------
pytest = $(bin)/pytest --numprocesses $(test_jobs) --dist loadfile --no-loadscope-reorder

test-python: $(installed)
	$(pytest) tests

test-cpp: tests-cpp
	$(bin)/ctest --test-dir $(call cmake_build,tests-cpp) --output-on-failure --parallel $(cmake_jobs)

tests-cpp: $(installed) gtest
	$(bin)/cmake -S tests/cpp -B $(call cmake_build,tests-cpp) -G Ninja -DCMAKE_MAKE_PROGRAM="$(here)$(bin)/ninja" \
		-DPython_EXECUTABLE="$(here)$(bin)/python" \
		-DCMAKE_PREFIX_PATH="$$($(bin)/python -I -c 'import muddformer.utils as u; print(u.cmake_prefix_path)')"
	$(bin)/cmake --build $(call cmake_build,tests-cpp) --parallel $(cmake_jobs)

# The build and the core of the operators and models alone: for a second version of torch. Those that take long first.
smoke: $(installed)
	$(pytest) tests/models/test_training_step.py tests/test_consumer.py tests/ops/test_depth_aggregate.py \
		tests/ops/test_connection_weights.py tests/models/test_golden.py tests/test_package.py

# The C++ tests with the library's CPU side under AddressSanitizer and UndefinedBehaviorSanitizer.
asan: $(ready) gtest
	$(bin)/cmake -S . -B $(call cmake_build,asan) -G Ninja -DCMAKE_MAKE_PROGRAM="$(here)$(bin)/ninja" \
		-DMUDDFORMER_TORCH_DIR="$$($(bin)/python -c 'import os, torch; print(os.path.dirname(torch.__file__))')" \
		-DPython_EXECUTABLE="$(here)$(bin)/python" \
		-DMUDDFORMER_CUDA=OFF -DMUDDFORMER_TESTS=ON -DMUDDFORMER_SANITIZE=address,undefined \
		-DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1"
	$(bin)/cmake --build $(call cmake_build,asan) --parallel $(cmake_jobs)
	$(bin)/ctest --test-dir $(call cmake_build,asan) --output-on-failure --parallel $(cmake_jobs)

# The small C++ tests under valgrind's memcheck. One process and one thread: loading LibTorch is most of the time.
valgrind: tests-cpp
	@command -v valgrind >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq valgrind; } \
		|| { echo "valgrind is missing: install the package valgrind." >&2; exit 1; }
	OMP_NUM_THREADS=1 valgrind --error-exitcode=1 --leak-check=full --errors-for-leak-kinds=definite \
		--suppressions=tests/cpp/valgrind.supp $(call cmake_build,tests-cpp)/muddformer_tests \
		--gtest_filter='Config*:Safetensors*:Checkpoint*:TokenDecoder*:Generate*:MUDDFormer*:KVCache*:*/Models.*/default'

gtest:
	@printf '#include <gtest/gtest.h>\n' | $(CXX) -E -x c++ - >/dev/null 2>&1 \
		|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq libgtest-dev; } \
		|| { echo "GoogleTest is missing: install libgtest-dev (Debian, Ubuntu) or gtest-devel (Fedora)." >&2; exit 1; }

# ---- pages ------------------------------------------------------------------------------------------------------
# Tables and pictures of README.md and docs/, from the CSV files in benchmarks/results.
report: $(installed)
	$(bin)/python benchmarks/report.py
	$(bin)/python benchmarks/plot.py

# docs/quality.md and its pictures, from benchmarks/results/quality.csv; and the rows, on a machine with a GPU: what
# ended is not repeated.
quality-report: $(installed)
	$(bin)/python benchmarks/quality/report.py benchmarks/results/quality.csv

quality: $(installed)
	$(bin)/python benchmarks/quality/corpus.py build/quality
	$(bin)/python benchmarks/quality/run.py benchmarks/quality/runs/*.yaml --corpus build/quality/parts \
		--out build/quality/runs --rows benchmarks/results/quality.csv

# build/docs/html/index.html; a warning is an error.
docs: $(VENV)/.docs-$(tag) doxygen
	mkdir -p build/docs
	doxygen docs/Doxyfile
	$(bin)/sphinx-build -W --keep-going -q -b html docs build/docs/html

$(VENV)/.docs-$(tag): $(installed)
	$(bin)/python -I -c 'import importlib.metadata as m; print(*(r.split(";")[0] for r in m.requires("muddformer") if "docs" in r), sep="\n")' \
		| $(bin)/python -m pip install --quiet -r /dev/stdin
	touch $@

doxygen:
	@command -v doxygen >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq doxygen; } \
		|| { echo "doxygen is missing: install the package doxygen." >&2; exit 1; }

# ---- form -------------------------------------------------------------------------------------------------------
cpp_files = $(shell git ls-files -co --exclude-standard '*.cpp' '*.h' '*.cu' '*.cuh')

$(VENV)/.lint-$(tag): $(ready) pyproject.toml
	$(bin)/python -m pip install --quiet ruff==0.17.6 clang-format==23.1.5
	touch $@

lint: $(VENV)/.lint-$(tag)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/clang-format --dry-run --Werror $(cpp_files)

format: $(VENV)/.lint-$(tag)
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
	$(bin)/clang-format -i $(cpp_files)

clean:
	rm -rf build dist *.egg-info muddformer/include muddformer/lib muddformer/share muddformer/*.so
