# Two promises: `make demo` sets up and runs the main job, `make test` sets up and passes the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Not compiled: Python does that when it imports, and it imports a small part of these packages.
PIP_INSTALL := $(BIN)/pip install -q --no-compile -c constraints.txt
EDGECAP := $(abspath $(BIN))/edgecap
DEMO ?= demo
JOBS ?= auto
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup engines demo test lint clean

setup: $(VENV)/.done

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.done: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e ".[test]"
	touch $@

demo: setup
	rm -rf $(DEMO) && mkdir $(DEMO)
	cd $(DEMO) && $(EDGECAP) train && $(EDGECAP) export --target onnx-int8 && $(EDGECAP) bench --device cpu

# The engines of the other targets. llama.cpp is compiled while everything else is installed, for any x86 and not for this
# very CPU (its default build for some of them crashes); without a C++ compiler its tests say that they are skipped.
engines: $(VENV)/.engines

$(VENV)/.engines: pyproject.toml constraints.txt
	$(MAKE) --no-print-directory --jobs=2 $(VENV)/.others $(VENV)/.llama
	wheel=$$(ls $(VENV)/llama/*.whl) || exit 0; $(PIP_INSTALL) -e ".[gguf]" $$wheel
	touch $@

$(VENV)/.others: $(VENV)/.done
	$(PIP_INSTALL) -e ".[test,qlora,openvino-export,coreml]"
	touch $@

$(VENV)/.llama: constraints.txt | $(BIN)/python
	rm -rf $(VENV)/llama
	if command -v c++ >/dev/null; then CMAKE_ARGS="$${CMAKE_ARGS:--DGGML_NATIVE=OFF}" \
	  $(BIN)/pip wheel -q --no-deps -c constraints.txt -w $(VENV)/llama llama-cpp-python; \
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
