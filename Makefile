# make setup | demo | test | test-slow | test-long | fuzz | soak | lint | docs | train | distill | export | engines | profile | generate | serve | check | bench
# Another interpreter, with everything installed already (no network needed): make test PY=python3
VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= python3
# A CPU-only torch is smaller: make setup TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'
TORCH ?= torch==2.13.0
# rtx (default), rtx-hopper (compute capability 9.0) or tensorrt; said, with the reason, when it is picked
EXTRA ?= $(shell $(PYTHON) longtake/commands/pick_extra.py)
# The recipe that fits this machine; any of engines/recipes
RECIPE ?= $(shell PYTHONPATH=$(CURDIR) $(PY) -m longtake doctor --pick)
STORY ?= docs/stories/demo.yaml
OUT ?= runs
STEPS ?= 12
# Processes that share the tests, a file at a time, the longest first (tests/helpers/longest.py); one where there is a GPU, whose memory they would share
JOBS ?= $(if $(shell command -v nvidia-smi),1,$(shell nproc))
# A model, or MODEL@RECIPE; what is made of it lies in $(LONGTAKE_HOME)/models/MODEL/RECIPE
MODEL ?= tiny-4step
# Exports, engines and compiled kernels of this checkout stay in it; git ignores build/
export LONGTAKE_HOME ?= $(CURDIR)/build
LONGTAKE = PYTHONPATH=$(CURDIR) $(PY) -m longtake

ifeq ($(PY),$(VENV)/bin/python)
READY := $(VENV)/.ready
endif

.PHONY: setup demo test test-slow test-long browser fuzz soak lint format docs doctor train export engines profile generate serve check distill experiment bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip
	$(VENV)/bin/python -m pip install -q -c constraints.txt $(TORCH)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[dev,serve,$(EXTRA)]'
	@touch $@
	@$(VENV)/bin/longtake doctor || true

# The whole chain: the shipped 4-step student first (export, build, generate, check); then a little training under NVFP4.
demo: $(READY)
	@set -e; recipe=$(RECIPE); shipped=training/checkpoints/tiny; model=$(MODEL)@$$recipe; \
	echo "== export the shipped 4-step student to ONNX =="; $(LONGTAKE) export --model $$model; \
	echo "== build the TensorRT engines =="; $(LONGTAKE) engines --model $$model; \
	echo "== generate =="; $(LONGTAKE) generate $(STORY) --model $$model --out $(OUT)/demo/video.mp4; \
	echo "== check accuracy =="; $(LONGTAKE) check --model $$model --report $(OUT)/demo/check.json; \
	echo "== train under NVFP4, $(STEPS) steps of the model that the student was distilled from =="; rm -rf $(OUT)/demo/train; \
	$(LONGTAKE) train --stage dit --init $$shipped --vae $$shipped --precision nvfp4 --context window --lr 2e-6 \
	  --steps $(STEPS) --batch 1 --chunks 1,2 --stories 8 --evaluate-steps 0 --out $(OUT)/demo/train; \
	echo; echo "video:  $(OUT)/demo/video.mp4"; echo "report: $(OUT)/demo/video.json"; \
	echo "check:  $(OUT)/demo/check.json"

# All that takes seconds; what takes longer (training runs, whole exports, a disk that fills up) is in test-slow, what
# takes minutes (soaks, thousands of fuzzed requests) in test-long
test: WHICH = not slow and not long
test-slow: WHICH = slow and not long
test-long: WHICH = long
test-slow test-long: browser
test test-slow test-long: $(READY)
	@if [ $(JOBS) -gt 1 ] && $(PY) -c 'import xdist' 2>/dev/null; then \
	  export OMP_NUM_THREADS=1 PARALLEL='-n $(JOBS) --dist loadfile --no-loadscope-reorder'; fi; \
	set -x; PYTHONPATH=$(CURDIR) $(PY) -m pytest -m '$(WHICH)' --durations 25 --durations-min 5 $$PARALLEL $(ARGS)

# The figures of docs/faults.md, in minutes: make fuzz ARGS='--share 0.1'. What they must show is what they fail below.
fuzz soak: $(READY)
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 $(PY) -W ignore tests/faults/figures.py $@ $(ARGS)

# What the page is tested in. Where it cannot be installed, those tests are skipped with the reason
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium || echo "Chromium could not be installed"; \
	else echo "no Chromium: as root, apt-get install --no-install-recommends chromium"; fi

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	PYTHONPATH=$(CURDIR) $(PY) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# The site of docs/ with the API reference, into build/site: warnings are errors. What it needs is installed if it is missing
docs: $(READY)
	@$(PY) -c 'import mkdocs, material, mkdocstrings' 2>/dev/null || $(PY) -m pip install -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

doctor: $(READY)
	$(LONGTAKE) doctor

train: $(READY)
	$(LONGTAKE) train --stage dit --data digits --init training/checkpoints/tiny --precision nvfp4 --context window \
	  --out $(OUT)/train

export: $(READY)
	$(LONGTAKE) export --model $(MODEL)@$(RECIPE)

engines: $(READY)
	$(LONGTAKE) engines --model $(MODEL)@$(RECIPE)

generate: $(READY)
	$(LONGTAKE) generate $(STORY) --model $(MODEL)@$(RECIPE) --out $(OUT)/generate/video.mp4

# A page on which one types and sees it: make serve ARGS='--port 8001'. What is not built yet is built first
serve: $(READY)
	$(LONGTAKE) serve $(ARGS)

check: $(READY)
	$(LONGTAKE) check --model $(MODEL)@$(RECIPE)

profile: $(READY)
	$(LONGTAKE) profile --engines $(MODEL)@$(RECIPE)

# Speed and memory on random weights: make bench ARGS='--recipe wan2.2-ti2v-5b_fp8_sm90 --against torch'
bench: $(READY)
	$(LONGTAKE) bench $(if $(findstring --recipe,$(ARGS)),,--recipe $(RECIPE)) $(ARGS)

# BF16, NVFP4 after and in training, students, sinks, drift, on all GPUs: docs/experiment.md. make experiment ARGS='--resume'
experiment: $(READY)
	$(LONGTAKE) experiment $(if $(findstring --out,$(ARGS)),,--out $(OUT)/experiment) $(ARGS)

distill: $(READY)
	$(LONGTAKE) distill --teacher training/checkpoints/tiny --student-steps 4 --precision nvfp4 --out $(OUT)/distill

clean:
	rm -rf build runs
