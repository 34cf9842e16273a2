# make demo   sets up .venv and trains a small model with Axolotl, rl: orpo; under two minutes once installed
# make test   sets up .venv with the development tools and runs every test
# make clean  removes what the demo wrote
#
# PYTHON=python3.12 make demo   takes that interpreter;  TORCH="torch==2.13.0 --index-url ..."  that build of torch.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
# Axolotl reports each run, and never exits without a network, unless told not to.
OFFLINE := AXOLOTL_DO_NOT_TRACK=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore

.PHONY: demo test clean

demo: $(VENV)/.installed-demo
	@rm -rf build/demo
	$(BIN)/python examples/demo/prepare.py
	$(OFFLINE) $(BIN)/axolotl train examples/demo/config.yml --launcher python
	@$(BIN)/python examples/demo/report.py

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

clean:
	rm -rf build/demo

$(VENV)/.installed-demo: $(VENV)/.torch
	$(BIN)/pip install --quiet -e '.[axolotl,plot]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.torch
	$(BIN)/pip install --quiet -e '.[dev]'
	@touch $@

# torch first: whatever else is installed then keeps this build.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	  "orpo-plugins needs Python 3.11 or newer, and $(PYTHON) is %d.%d: PYTHON=python3.12 make ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install $(TORCH)
	@touch $@
