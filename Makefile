# make demo   set-up, then the whole job on this computer: profile, search, train, export, validate, report
# make test   set-up, then style, types, import rules and all tests
# make fast   the same without slow tests: a few minutes
# make references   installs the third-party programs that read our files in tests: MediaPipe and tflite-runtime (Python 3.11)
PYTHON ?= python3
VENV ?= .venv
PROCESSES ?= auto
BIN := $(VENV)/bin

.PHONY: demo test fast check setup references judges benchmark clean

demo: $(VENV)/installed
	$(BIN)/hwnas run configs/quickstart.toml

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal

fast: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal -m "not slow"

check: setup
	$(BIN)/ruff format --check -q .
	$(BIN)/ruff check -q .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

benchmark: setup
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only -s

setup: $(VENV)/installed-dev

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

references: .venv-mediapipe/installed .venv-tflite-runtime/installed

# the old name of references
judges: references

.venv-%/installed: tests/apps/%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install -q --disable-pip-version-check --no-deps -r $<
	touch $@

clean:
	rm -rf $(VENV) .venv-mediapipe .venv-tflite-runtime runs .mypy_cache .ruff_cache .import_linter_cache .hypothesis
