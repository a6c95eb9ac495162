# Two promises: `make demo` sets up and runs the main job, `make test` sets up and passes the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EDGECAP := $(abspath $(BIN))/edgecap
DEMO ?= demo
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup demo test lint clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[test]"
	touch $@

demo: setup
	rm -rf $(DEMO) && mkdir $(DEMO)
	cd $(DEMO) && $(EDGECAP) train && $(EDGECAP) export --target onnx-int8 && $(EDGECAP) bench --device cpu

test: setup
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info
