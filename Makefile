# make demo   train a small GPT with two workers: uncompressed, lossless, at 2 bits; then compare
# make test   everything that CI runs: linters, types, all tests
# make quick  the linters and all but the slow tests: for every day
# make lint   the linters alone
# make fuzz   search for bytes that break the decoders, for SECONDS (needs clang)
# make native build the C++ kernels in place, for work on them
# make clean  remove what was built; .venv stays (make distclean removes it too)
#
# make test ARGS="-k resume" passes arguments to pytest, ARGS="-n 0 --pdb" runs one test after another in this process;
# PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
ARGS ?=
SECONDS ?= 60

BIN := .venv/bin
# Constraints only: users who need another build of torch point pip at its index by PIP_EXTRA_INDEX_URL.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
KERNELS := efficient_dl/codec/kernels/native
# What an installation depends on. Python files are not among them: it is an editable one.
INPUTS := pyproject.toml constraints.txt $(wildcard CMakeLists.txt $(KERNELS)/*.cpp $(KERNELS)/*.h $(KERNELS)/*.hpp)
# One worker more than cores: tests/conftest.py.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadgroup
SCRIPTS := $(shell find .ci benchmarks cluster docker efficient_dl launch tests -name '*.sh' -o -name '*.sbatch' 2>/dev/null)

# Hundreds of processes of the tests would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test quick lint fuzz native clean distclean
.NOTPARALLEL:

demo: .venv/installed
	$(BIN)/edl demo --out runs/demo

test: lint
	$(PYTEST) $(ARGS)

quick: lint
	$(PYTEST) -m "not slow" $(ARGS)

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/shellcheck .ci/run $(SCRIPTS)
	$(BIN)/hadolint $(wildcard docker/*.Dockerfile)

fuzz:
	bash tests/fuzz/fuzz.sh $(SECONDS)

native:
	bash $(KERNELS)/build.sh

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	rm -f .venv/installed .venv/installed-test $(KERNELS)/*.so

distclean: clean
	rm -rf .venv

# Each stamp is written last: an interrupted installation is begun again, a finished one is not repeated.
.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "efficient_dl needs Python 3.11 or newer; $(PYTHON) is none: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || \
		{ echo "efficient_dl needs a C++ compiler: apt-get install g++, or set CXX" >&2; exit 1; }
	$(PYTHON) -m venv .venv || \
		{ rm -rf .venv; echo "no virtual environment: apt-get install python3-venv" >&2; exit 1; }
	touch $@

.venv/installed: .venv/created $(INPUTS)
	$(INSTALL) --editable .
	touch $@

.venv/installed-test: .venv/created $(INPUTS)
	$(INSTALL) --editable '.[test]'
	$(INSTALL) --no-deps --prefix .venv/mpich mpich   # a second MPI, out of the way of the first
	touch .venv/installed $@
