# make demo    train the recipe demo, evaluate it, predict; about two minutes on two cores after the install
# make test    the tests, but those that take more than ten seconds each;  make test-slow: these
# make test-wheel  the wheel with each extra in an empty environment, which downloads PyTorch
# make docs    the site, in docs/_build/index.html; a warning is an error
# make campaign  the reliability campaign, one to two hours; SEED=1 for another, and it goes on where it was stopped
# make lint    ruff, mypy and the import contract;  make format: ruff, with automatic fixes
# make web     the browser demo as static files in web/dist (web/README.md); make test-web: its tests in headless Chromium
# Each creates .venv first where it is missing. Needs Python 3.11 or later; choose one with PYTHON=...
# or bring your own environment with BIN=... (its bin folder).

VENV := .venv
BIN ?= $(VENV)/bin
FITS := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c "$(FITS)" 2>/dev/null && echo $$p && break; done)
DEMO := runs/demo
JOBS ?= 2
ORT := web/node_modules/.package-lock.json
SEED ?= 0

# A stamp file a set of extras: installed again only when pyproject.toml is newer.
ifeq ($(BIN),$(VENV)/bin)
TRAIN := $(VENV)/.train
DEV := $(VENV)/.dev
EXPORT := $(VENV)/.export
endif

.PHONY: demo test test-slow test-wheel campaign docs lint format web test-web clean

demo: $(TRAIN)
	rm -rf $(DEMO)
	$(BIN)/dualtoken-vit train demo --out $(DEMO)
	$(BIN)/dualtoken-vit evaluate $(DEMO)/best.safetensors
	$(BIN)/python -c "from dualtoken_vit.data.shapes import save; save('$(DEMO)/images')"
	$(BIN)/dualtoken-vit predict $(DEMO)/best.safetensors $(DEMO)/images --out $(DEMO)/predictions
	@echo "Look at $(DEMO): curves.png, confusion.png, predictions/sheet.png"

# One thread a process: several processes that each use all the cores are slower than one.
test: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow"

test-slow: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m slow

# Several gigabytes, with CUDA.
test-wheel: $(DEV)
	DUALTOKEN_INSTALL=1 $(BIN)/python -m pytest -s tests/test_package.py -k test_each_extra_installs

docs: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

campaign: $(DEV)
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR):$(CURDIR)/tests $(BIN)/python -m campaign --out runs/campaign-$(SEED) --seed $(SEED) \
		--report results/RELIABILITY.md

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy dualtoken_vit
	$(BIN)/lint-imports --no-cache

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# CHECKPOINT=best.safetensors shows another network than T (mix) with the package's weights, SEGMENTER=... also masks.
web: $(EXPORT) $(ORT)
	$(BIN)/python web/build_page.py $(if $(CHECKPOINT),--classifier $(CHECKPOINT)) $(if $(SEGMENTER),--segmenter $(SEGMENTER))

test-web: $(DEV) $(ORT)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest web

$(ORT): web/package-lock.json
	cd web && npm ci --ignore-scripts --no-audit --no-fund
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_build web/dist web/node_modules *.egg-info .pytest_cache .ruff_cache

$(VENV)/.%: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed; if you have one, name it: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -e ".[$*]"
	touch $@
