# moetuner's menu. Every target sets up what it needs in .venv; what is up to date is left alone.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
BASE   := $(VENV)/base.stamp
TOOLS  := $(VENV)/tools.stamp
SPHINX := $(VENV)/docs.stamp
# Tools of a release are an environment of their own: they want other versions of what others want.
UPLOAD := $(VENV)/release
CORE   := python/moetuner/_core.abi3.so
# What the package index shows: README with absolute addresses.
INDEX  := python/README.md
RUST   := Cargo.toml Cargo.lock $(shell find rust -name '*.rs')
# What bench-peers compares with; one that is not to be had is left out.
PEERS  := mtkahypar numba scipy ortools setuptools setuptools-scm
WHEELS := vllm==0.33.0 sglang==0.5.23 vllm-ascend==0.26.0rc1
# STAIR is in no wheel for x86-64. pip asks the archive for its name and version, which needs the three variables.
STAIR  := 0.30.0rc2
DATA   ?= ../shared/data
DENY   ?= check
DOCKER ?= docker
# Only this venv, whatever else is active.
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
unexport CONDA_PREFIX PYTHONPATH
# Tests start commands by the hundred, and each would compile the whole package anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo docs pictures test lint fix types test-rust test-python test-wheel engines bench bench-peers scorecard wheel wheels sdist \
	image test-root test-sdist test-masked test-oldest test-threads check-wheels check-files check-rust deny audit release-check clean

help:  ## show this menu
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-13s %s\n' "$$name" "$$text"; done

$(BASE): pyproject.toml
	@command -v cargo > /dev/null || { echo 'make: cargo not found; install Rust from https://rustup.rs' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo 'make: Python 3.10 or newer is needed: make PYTHON=python3.12' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --group build
	@touch $@

# Tests import few of the modules of torch and transformers; Python compiles these when they are imported.
$(TOOLS): $(BASE)
	$(BIN)/python -m pip install --quiet --no-compile --group test
	@touch $@

$(SPHINX): $(BASE)
	$(BIN)/python -m pip install --quiet --no-compile --group docs
	@touch $@

$(CORE): $(BASE) $(RUST)
	@echo 'building the core: about three minutes of one core, once'
	PIP_QUIET=1 $(BIN)/maturin develop --release --quiet --extras report
	@touch $@

$(UPLOAD)/stamp: $(BASE)
	test -x $(UPLOAD)/bin/python || $(PYTHON) -m venv $(UPLOAD)
	$(UPLOAD)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(UPLOAD)/bin/python -m pip install --quiet --group build --group release
	@touch $@

setup: $(CORE) $(TOOLS)  ## make .venv with the package (editable) and the tools

demo: $(CORE)  ## run the whole flow on the bundled trace
	@$(BIN)/moetuner demo
	@echo; echo 'moetuner is in $(BIN): ". $(BIN)/activate" puts it on the path of this shell.'

test: lint types docs test-rust test-python test-wheel  ## everything that must be green

lint: $(TOOLS)  ## ruff, rustfmt, clippy; public names against those of the last tag
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	cargo fmt --check
	cargo clippy --quiet --all-targets --features python -- -D warnings
	@if tag=$$(git describe --tags --abbrev=0 2> /dev/null); then \
		echo "griffe check: public names against $$tag"; \
		$(BIN)/python -m griffe check moetuner --search python --against "$$tag"; \
	else echo 'griffe check: no tag yet, so no public names to keep'; fi

fix: $(TOOLS)  ## format, and mend what the linters can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	cargo fmt

types: $(CORE) $(TOOLS)  ## mypy, and the stub against the built core
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest --ignore-disjoint-bases moetuner._core

test-rust:  ## tests of the core alone
	@if cargo nextest --version > /dev/null 2>&1; then cargo nextest run; else cargo test --lib --tests; fi
	cargo test --quiet --doc

# Tests run side by side, one more than cores, as some wait. Threads of their own would only wait for each other.
test-python: export OPENBLAS_NUM_THREADS := 1
test-python: export OMP_NUM_THREADS := 1
test-python: export RAYON_NUM_THREADS := 1
test-python: $(CORE) $(TOOLS)  ## tests of the package
	workers=$$(($$(getconf _NPROCESSORS_ONLN) + 1)); \
		$(BIN)/python -m pytest -q --numprocesses $$workers --maxprocesses 4 --dist worksteal

# Every page is read again: what the build before has read says nothing of a link that is dead by now.
docs: $(CORE) $(SPHINX)  ## build docs/_build/html, and stop at dead links and unknown names
	$(BIN)/python -m sphinx -n -W -E --keep-going -q docs docs/_build/html

# They are stored, as GitHub shows them too; tests/test_site.py says when they are old.
pictures: $(CORE) $(TOOLS)  ## draw the documents' pictures from the bundled trace (Chrome or Chromium)
	$(BIN)/python docs/_extensions/pictures.py

$(INDEX): README.md pyproject.toml .ci/package-readme.py
	$(PYTHON) .ci/package-readme.py

wheel: $(BASE) $(INDEX)  ## build dist/*.whl
	rm -rf dist
	$(BIN)/maturin build --release --quiet --out dist

wheels: $(UPLOAD)/stamp $(INDEX)  ## build dist/*.whl for old glibc and musl, x86-64 and aarch64, as far as rustc has them
	.ci/wheels.sh $(UPLOAD)/bin dist

sdist: $(BASE) $(INDEX)  ## build dist/*.tar.gz
	$(BIN)/maturin sdist --out dist

check-wheels: $(UPLOAD)/stamp  ## names, texts, C library and stable interface of what is in dist
	.ci/check-wheels.sh $(UPLOAD)/bin dist/*

check-files: $(UPLOAD)/stamp  ## workflows, Dockerfile and CITATION.cff, without the network
	$(UPLOAD)/bin/zizmor --offline --quiet .github
	@if command -v actionlint > /dev/null; then actionlint; \
		else echo 'actionlint not found: go install github.com/rhysd/actionlint/cmd/actionlint@latest'; fi
	$(UPLOAD)/bin/hadolint Dockerfile
	$(UPLOAD)/bin/cffconvert --validate

deny:  ## licenses, sources and advisories of the Rust crates
	@if cargo deny --version > /dev/null 2>&1; then cargo deny --all-features $(DENY); \
		else echo 'cargo-deny not found: cargo install --locked cargo-deny'; fi

audit: $(CORE) $(UPLOAD)/stamp  ## known faults of the Python packages that come along (network)
	$(BIN)/python -m pip freeze --exclude-editable > build-requirements.txt
	$(UPLOAD)/bin/pip-audit --strict --requirement build-requirements.txt --no-deps --disable-pip; \
		status=$$?; rm -f build-requirements.txt; exit $$status

test-masked: $(CORE)  ## the self-test on emulated processors without AVX-512 and AVX2 (minutes)
	.ci/masked.sh $(BIN)/python

test-oldest: wheel  ## the wheel with the oldest dependencies that it allows
	.ci/oldest.sh $(BIN)/python dist/*.whl

check-rust: $(BASE)  ## compile the core with the oldest Rust that Cargo.toml allows (rustup)
	rustup run --install $$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml) \
		cargo check --quiet --locked --features python

test-threads:  ## tests of threads on PYTHON, which may be a free-threaded one
	.ci/threads.sh $(PYTHON)

test-root:  ## README's first two commands in an empty root of a distribution: the wheel of dist (as root)
	.ci/empty-root.sh dist/*-abi3-manylinux*_$$(uname -m).whl

image:  ## build the image of the command line, whose last step is the self-test, and use it: DOCKER=podman
	$(DOCKER) build --tag moetuner .
	$(DOCKER) run --rm --network none moetuner --version --json

test-sdist: sdist  ## build the wheel of the sdist, far from the clone, and use it
	rm -rf build/sdist && mkdir -p build/sdist
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation \
		--wheel-dir build/sdist dist/*.tar.gz
	tests/wheel.sh $(BIN)/python build/sdist/*.whl

release-check: check-files wheels sdist check-wheels  ## all of a release that needs no network: after make test
	$(MAKE) deny DENY='--offline check licenses bans sources'
	tests/wheel.sh $(BIN)/python dist/*-abi3-manylinux*_$$(uname -m).whl
	$(MAKE) test-root test-sdist test-masked

test-wheel: wheel  ## install the wheel into a fresh environment and use it there
	tests/wheel.sh $(BIN)/python dist/*.whl

engines: wheel  ## real engines on the CPU with moetuner inside (20 GB, an hour): ENGINES=vllm for one
	$(BIN)/python tests/engines/run.py --wheel dist/*.whl $(ENGINES)

bench: $(CORE) $(TOOLS)  ## one file per question, each prints its answer (quick settings)
	$(BIN)/python bench/scale.py transitions sets text replay stream --turns 3 --bytes 200000000
	$(BIN)/python bench/versus.py --quick
	$(BIN)/python bench/cluster --quick

bench-peers: $(CORE) $(TOOLS)  ## ours beside peers' released code (45 minutes); DATA=FOLDER has recorded traffic
	-@for package in $(PEERS); do $(BIN)/python -m pip install --quiet $$package; done
	-@for wheel in $(WHEELS); do \
		$(BIN)/python -m pip download --quiet --no-deps --dest build/wheels $$wheel; done
	-@SETUPTOOLS_SCM_PRETEND_VERSION=$(STAIR) COMPILE_CUSTOM_KERNELS=0 SOC_VERSION=ascend910b1 $(BIN)/python -m pip \
		download --quiet --no-deps --no-build-isolation --dest build/wheels vllm-ascend==$(STAIR)
	$(BIN)/python bench/versus.py --data $(DATA)
	$(BIN)/python bench/balance.py --data $(DATA)

scorecard: $(CORE) $(TOOLS)  ## some ninety answers beside those stored: what a change of the code changes
	$(BIN)/python bench/scorecard.py

clean:  ## remove everything that was built
	rm -rf $(VENV) .engines target dist $(CORE) demo-output docs/_build
