# The same commands that .ci/run runs, and the rarer ones.
PYTHON ?= python
.PHONY: style quality test parity torture gpu bench

style:  ## Rewrite the code in the house's style.
	ruff check --fix .
	ruff format .

quality:  ## Everything that can be checked without running the code.
	ruff check .
	ruff format --check .
	mypy
	lint-imports
	interrogate --config pyproject.toml llavar_peft

test:  ## The README's test command.
	$(PYTHON) -m pytest

parity:  ## Held against what the original's code gave.
	$(PYTHON) -m pytest -m parity

torture:  ## Kills, corrupts and starves runs.
	LLAVAR_TORTURE_KILLS=200 $(PYTHON) -m pytest -m torture --timeout 7200

gpu:  ## What needs a CUDA device.
	$(PYTHON) -m pytest -m gpu

bench:  ## Times and memory against named peers.
	$(PYTHON) benchmarks/data.py
	$(PYTHON) benchmarks/train.py --levers
	$(PYTHON) benchmarks/weights.py --dry-run-13b
	$(PYTHON) benchmarks/inference.py
