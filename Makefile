# Two commands do everything: `make run` and `make test`. Each sets itself up in .venv, nothing is global.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROMPT ?= a red circle moving right

GPU_PYTHON ?= 3.12
.PHONY: run serve test check screenshots parity bench bench-serving chaos soak gpu-wheels gpu clean
.DELETE_ON_ERROR:

run: $(VENV)/.run  ## one prompt over HTTP through a 2-rank mesh; a video and a contact sheet in outputs/
	$(BIN)/framemesh run --num-gpus 2 --port 0 --prompt "$(PROMPT)" $(ARGS)

serve: $(VENV)/.run  ## stay up and print the URL
	$(BIN)/framemesh serve --num-gpus 2 $(ARGS)

test: check  ## everything CI runs
	$(BIN)/python -m pytest --durations 30 $(ARGS)

check: $(VENV)/.test  ## style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

screenshots: $(VENV)/.test  ## the README's pictures of the playground, from the demo model on two ranks
	PYTHONPATH=. OMP_NUM_THREADS=1 $(BIN)/python tests/screenshots.py

parity: $(VENV)/.test  ## every family, layout and batching against diffusers; docs/parity.md (about 7 minutes)
	PYTHONPATH=. OMP_NUM_THREADS=1 $(BIN)/python tests/parity_page.py $(ARGS)

bench: $(VENV)/.test  ## the figures of bench/results/, measured again (about 10 minutes on a quiet machine)
	$(BIN)/python -m bench.latency
	$(BIN)/python -m bench.gaps
	$(BIN)/python -m bench.idle
	$(BIN)/python -m bench.throughput
	$(BIN)/python -m bench.plan
	$(BIN)/python -m bench.prediction
	$(BIN)/python -m bench.fuzz
	$(BIN)/python -m bench.parallel
	$(BIN)/python -m bench.parallel --ranks 4 --pairs 1
	$(BIN)/python -m bench.projections
	$(BIN)/python -m bench.backpressure

bench-serving: $(VENV)/.test  ## every policy and a naive diffusers server on the same traces (about 20 minutes)
	$(BIN)/python -m bench.serving
	$(BIN)/python -m bench.validate

chaos: $(VENV)/.test  ## every process killed and suspended in every phase under load (about 10 minutes)
	$(BIN)/python -m bench.chaos

soak: $(VENV)/.test  ## 20 minutes of load with a kill every half minute
	$(BIN)/python -m bench.soak

gpu-wheels: $(VENV)/.test  ## what a GPU machine without network lacks, for its Python (GPU_PYTHON): docs/gpu.md
	$(BIN)/python -m bench.gpu_wheels --python $(GPU_PYTHON) --folder .wheels

# Beside the machine's own torch, wherever that is installed; a virtual environment would not see another one's packages.
# The tests come first, but what they find is no reason not to measure. Warnings of another torch are no errors.
gpu: export PYTHONPATH := .gpu:.
gpu:  ## there: the tests that need a GPU, two ranks on one GPU, and bench/gpu.py
	rm -rf .gpu && $(PYTHON) -m pip install --quiet --no-index --no-deps --find-links .wheels --target .gpu --requirement .wheels/requirements.txt
	status=0; \
	$(PYTHON) -m pytest -m gpu -W default tests/test_gpu.py || status=1; \
	$(PYTHON) -m bench.gpu --staged $(ARGS) > .gpu/staged.txt || { tail -n 40 .gpu/staged.txt; status=1; }; \
	$(PYTHON) -m bench.gpu $(ARGS) || status=1; \
	exit $$status

# The CPU build of torch satisfies the pin where that is what the index offers; a CUDA machine gets the CUDA build.
$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 13) else "framemesh needs Python 3.11 to 3.13, this is " + sys.version.split()[0] + "; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.run: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.run
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	$(BIN)/python -m pip install --quiet --upgrade --target $(VENV)/openai-2.8 openai==2.8.0
	touch $@

clean:
	rm -rf $(VENV) .wheels .gpu build dist *.egg-info
