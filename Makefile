# make setup | demo | test | lint | train | distill | export | engines | profile | generate | check | bench
# Another interpreter, with everything installed already (no network needed): make test PY=python3
VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= python3
TORCH ?= torch==2.13.0
RTX ?= $(shell $(PYTHON) engines/pick_extra_cli.py)
RECIPE ?= tiny_nvfp4_sm120
STORY ?= docs/stories/demo.yaml
OUT ?= runs
STEPS ?= 24
LONGTAKE = PYTHONPATH=$(CURDIR) $(PY) -m longtake.runtime.cli

ifeq ($(PY),$(VENV)/bin/python)
READY := $(VENV)/.ready
endif

.PHONY: setup demo test lint format train distill export engines profile generate check bench doctor clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip
	$(VENV)/bin/python -m pip install -q -c constraints.txt '$(TORCH)'
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[dev,$(RTX)]'
	@touch $@
	@$(VENV)/bin/longtake doctor || true

test: $(READY)
	PYTHONPATH=$(CURDIR) $(PY) -m pytest

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

doctor: $(READY)
	$(LONGTAKE) doctor

train: $(READY)
	$(LONGTAKE) train --stage dit --data digits --out $(OUT)/train

export: $(READY)
	$(LONGTAKE) export --recipe $(RECIPE)

engines: $(READY)
	$(LONGTAKE) engines --recipe $(RECIPE)

generate: $(READY)
	$(LONGTAKE) generate $(STORY) --engines $(RECIPE) --out $(OUT)/generate/video.mp4

check: $(READY)
	$(LONGTAKE) check --recipe $(RECIPE)

profile: $(READY)
	$(LONGTAKE) profile --engines $(RECIPE)

distill bench:
	@echo "make $@: not there yet; see the README's table of what works" >&2; exit 2

clean:
	rm -rf export/build engines/build runs
