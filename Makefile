# make demo   train a small MoE language model and look at its param groups
# make test   the tests (make test-long: those that take longest; make campaign: hundreds of kills,
#             full disks and flipped bits; make test-numeric: those that depend on how the
#             processor rounds, once more with the plainest instructions it has)
# make lint   ruff, mypy and import-linter;  make docs: the site, into site/;  make bench: benchmarks
# make compatibility   tests of each feature in environments with other releases of Python, torch,
#             DeepSpeed and transformers (make smoke: the core in the oldest and the newest);
#             make contract: with the DeepSpeed of DEEPSPEED_SOURCE
# make gpu-wheels   what tests/gpu/run.sh needs on a machine with a GPU and without network
# make dist   the sdist and the wheel, into dist/, tried in a fresh environment
#
# Each sets up what it needs in .venv. PYTHON chooses the interpreter, ARGS goes to the demo.

PYTHON ?= python3
VENV ?= .venv
RANKS ?= 2
ARGS ?=
BIN := $(VENV)/bin
EXTENSIONS := $(CURDIR)/.cache/torch_extensions
# Unless each rank can have a GPU of its own, all run on the CPU.
GPUS = $$($(BIN)/python -c "import torch; print(torch.cuda.device_count())")
CPU_ONLY = export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
# The profiler, DeepSpeed and torch announce themselves on every rank.
QUIET := KINETO_LOG_LEVEL=99 TORCH_CPP_LOG_LEVEL=ERROR PYTHONWARNINGS=ignore::FutureWarning

BENCHMARKS := grouping_time group_cost group_count_cost step_memory demo_memory large_world \
  regroup_checkpoint checkpoint_faults topologies checkpointing load_experts load_autoep load_zero3 \
  group_metrics expert_balance

.PHONY: demo test test-long test-numeric campaign lint docs bench compatibility smoke contract dist \
  gpu-wheels clean
# Two workers each: a rank mostly waits for the others. Files stay together, as each worker starts
# its pools of ranks once. What is long counts on its time, and runs alone.
PYTEST := $(BIN)/python -m pytest
PURE := OMP_NUM_THREADS=1 $(PYTEST) tests/pure -n 2 --dist worksteal
RANKS_TOO := $(PYTEST) tests/distributed tests/gpu

demo: $(VENV)/.demo unlock
	@[ $(GPUS) -ge $(RANKS) ] || $(CPU_ONLY); \
	$(QUIET) OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR=$(EXTENSIONS) \
	  $(BIN)/torchrun --nproc-per-node $(RANKS) docs/examples/train_moe_lm.py $(ARGS)

test: $(VENV)/.test
	$(PURE) -m "not long and not campaign"
	$(RANKS_TOO) -n 2 --dist loadfile -m "not long and not campaign"

test-long: $(VENV)/.test
	$(PURE) -m long
	$(RANKS_TOO) -m long

campaign: $(VENV)/.test
	$(PYTEST) -m campaign

test-numeric: $(VENV)/.test
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 \
	  $(BIN)/python -m pytest -m "numeric and not long and not campaign"

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.test
	set -e; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name; done

compatibility: $(VENV)/.compatibility
	$(BIN)/nox -f tests/noxfile.py

# The oldest and the newest of each.
smoke: $(VENV)/.compatibility
	$(BIN)/nox -f tests/noxfile.py -s "compatibility(oldest)" "compatibility(newest)" -- core

contract: $(VENV)/.compatibility
	$(BIN)/nox -f tests/noxfile.py -s contract

# The machine brings torch and numpy for GPU_PYTHON. DeepSpeed compiles what it needs of its ops there.
GPU_PYTHON ?= 3.12
WHEELS ?= .cache/gpu-wheels
PLATFORMS := $(foreach n,12 17 24 27 28,--platform manylinux_2_$(n)_x86_64) \
  --platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64
BRINGS := torch|numpy

gpu-wheels: $(VENV)/.test
	rm -rf $(WHEELS)
	DS_BUILD_OPS=0 $(BIN)/python -m pip wheel --quiet --no-deps -w $(WHEELS) .
	DS_BUILD_OPS=0 $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation \
	  --no-binary deepspeed -c constraints.txt -w $(WHEELS) deepspeed
	$(BIN)/python -c "import importlib.metadata as m; print(*m.requires('deepspeed'), sep='\n')" \
	  | grep -Ev '^($(BRINGS))|extra ==' > $(WHEELS)/needs.txt
	$(BIN)/python -m pip download --quiet --only-binary :all: --python-version $(GPU_PYTHON) \
	  $(PLATFORMS) -c constraints.txt -d $(WHEELS) -r $(WHEELS)/needs.txt \
	  pytest hypothesis tabulate tqdm
	@du -sh $(WHEELS)

# The wheel is built from the sdist, and tried without DeepSpeed, away from the checkout.
FRESH := $(CURDIR)/.cache/fresh
dist: $(VENV)/.dist
	rm -rf dist build *.egg-info
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m tests.package
	$(PYTHON) -m venv --clear $(FRESH)
	$(FRESH)/bin/python -m pip install --quiet -c constraints.txt "$$(echo dist/*.whl)[cli]"
	cd $(FRESH) && bin/python -c "import moe_groups; print(moe_groups.create_moe_param_groups)"
	cd $(FRESH) && bin/moe-groups plan mixtral --world-size 64 --ep 8
	@ls -l dist

$(VENV)/.dist: $(VENV)/.python constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt build twine
	@touch $@

# A killed process leaves a lock behind on which the next compilation would wait forever.
.PHONY: unlock
unlock:
	@rm -f $(EXTENSIONS)/*/lock $(EXTENSIONS)/*/*/lock

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	@touch $@

# One stamp per set of packages: demo, test, lint, docs.
$(VENV)/.%: $(VENV)/.python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$*]'
	@touch $@

# Types and imports of the tests and benchmarks are checked too.
$(VENV)/.lint: $(VENV)/.test

clean:
	rm -rf $(VENV) .cache site build dist *.egg-info
