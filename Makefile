# Two promises: `make demo` sets up and runs the main job, `make test` sets up and passes the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EDGECAP := $(abspath $(BIN))/edgecap
DEMO ?= demo
JOBS ?= auto
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup engines demo test lint clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[test]"
	touch $@

demo: setup
	rm -rf $(DEMO) && mkdir $(DEMO)
	cd $(DEMO) && $(EDGECAP) train && $(EDGECAP) export --target onnx-int8 && $(EDGECAP) bench --device cpu

# The engines of the other targets. llama.cpp is built here, for any x86 and not for this very CPU (its default build for
# some of them crashes); without a C++ compiler its tests say that they are skipped.
engines: $(VENV)/.engines

$(VENV)/.engines: $(VENV)/.done
	$(BIN)/pip install -q -c constraints.txt -e ".[test,qlora,openvino-export,coreml]"
	if command -v c++ >/dev/null; then \
	  CMAKE_ARGS="$${CMAKE_ARGS:--DGGML_NATIVE=OFF}" $(BIN)/pip install -q -c constraints.txt -e ".[gguf]"; \
	else echo "no C++ compiler: GGUF is left out, its tests will be skipped"; fi
	touch $@

test: engines
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info
