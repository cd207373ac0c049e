# Development commands; .ci/run runs `quality`, `docs` and the tests.
PYTHON ?= python
.PHONY: style quality test parity torture gpu docs fuzz bench wheel-test

style:  ## Format the code and fix what ruff can fix.
	ruff check --fix .
	ruff format .

quality:  ## Check what can be checked without running the code.
	ruff check .
	ruff format --check .
	mypy
	lint-imports
	interrogate --config pyproject.toml llavar_peft

test:  ## Run the README's test command.
	$(PYTHON) -m pytest

parity:  ## Compare with the outputs of the original code.
	$(PYTHON) -m pytest -m parity

torture:  ## Kill, corrupt and starve runs.
	LLAVAR_TORTURE_KILLS=200 LLAVAR_TORTURE_MATRIX=all $(PYTHON) -m pytest -m torture --timeout 7200

gpu:  ## Run the tests that need a CUDA device.
	$(PYTHON) -m pytest -m gpu

docs:  ## Build the documentation into build/site.
	$(PYTHON) -m mkdocs build --strict

fuzz:  ## Damage the files that users give, and look for tracebacks, hangs and excessive memory.
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PYTHON) -m tests.fuzz $(FUZZ_ARGS)

wheel-test:  ## Install the built wheel with its dependencies in a new environment, and run the quickstart there.
	$(PYTHON) -m tests.built_package

bench:  ## Measure time and memory against named peers.
	$(PYTHON) benchmarks/data.py
	$(PYTHON) benchmarks/train.py --levers
	$(PYTHON) benchmarks/weights.py --dry-run-13b
	$(PYTHON) benchmarks/inference.py
	$(PYTHON) benchmarks/resolution.py
	$(PYTHON) benchmarks/resolution_estimates.py
	$(PYTHON) benchmarks/hardware.py
	$(PYTHON) benchmarks/train_limit.py --out benchmarks/results/train_limit
	$(PYTHON) benchmarks/open_quantized.py --out benchmarks/results/open_quantized
	$(PYTHON) benchmarks/ocr.py --out benchmarks/results/ocr
	$(PYTHON) benchmarks/startup.py --out benchmarks/results/startup
	$(PYTHON) benchmarks/write_docs.py
