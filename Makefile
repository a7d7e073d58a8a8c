# Every target does its own set-up. Caches live outside the clone: in CARGO_TARGET_DIR if set, and in
# GBO_CACHE_DIR (default ~/.cache/gemini-batch-operator) for the control plane, helm and the Python packages.

SHELL := bash
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

export GBO_CACHE_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/gemini-batch-operator
TARGET_DIR = $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
CARGO ?= cargo

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z][a-z0-9-]*:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

# ------------------------------------------------------------------------------------ for users

.PHONY: demo
demo: ## Run the main job, from kubectl apply to results, and print what it cost
	@$(call run-demo,)

.PHONY: demo-check
demo-check: ## Check that the demo fails, and says why, when something is wrong, and leaves nothing behind
	@$(call run-demo,,python3 hack/demo_check.py)

.PHONY: up
up: ## The same as demo, left running to play with until Ctrl-C
	@$(call run-demo,--keep)

.PHONY: test
test: toolchain toolchain-sdk control-plane helm ## Run all tests: unit, property, a real API server, the official Python SDK
	@echo "== Rust tests (unit, property, operator on a real API server, simulator)"
	export GBO_DEVCLUSTER="$$(hack/devcluster/ensure.sh)" GBO_HELM="$$(hack/helm.sh)"
	$(CARGO) test --workspace --locked --features crash-points
	@echo "== Go tests (control plane launcher)"
	devcluster="$$(hack/devcluster/ensure.sh)"
	cd hack/devcluster
	export CGO_ENABLED=0 GOFLAGS=-mod=readonly
	go test -trimpath ./...
	# Never from Go's cache: it is about processes of this machine.
	DEVCLUSTER_BIN="$$devcluster" go test -trimpath -count=1 -tags integration ./integration
	cd "$(CURDIR)" && $(MAKE) test-sdk

.PHONY: test-sdk
test-sdk: toolchain-sdk ## The official Python SDK against the simulator
	@echo "== The official Python SDK against the simulator"
	$(CARGO) build -p gemini-simulator --locked
	GBO_SIMULATOR="$(TARGET_DIR)/debug/gemini-simulator" tests/sdk/run.sh

# ------------------------------------------------------------------------------- for developers

.PHONY: check
check: fmt lint generated ## Format, lints and generated files, as CI checks them

.PHONY: fmt
fmt: ## Fail if the sources are not formatted
	$(CARGO) fmt --all --check
	$(CARGO) fmt --all --check --manifest-path fuzz/Cargo.toml
	@unformatted="$$(gofmt -l hack)"; if [ -n "$$unformatted" ]; then echo "gofmt: $$unformatted"; exit 1; fi

.PHONY: lint
lint: ## clippy and go vet, warnings are errors
	$(CARGO) clippy --workspace --all-targets --locked --features crash-points -- -D warnings
	cd hack/devcluster && CGO_ENABLED=0 go vet -trimpath ./...

.PHONY: fuzz
fuzz: ## Fuzz the parsers of outside bytes, FUZZ_SECONDS (default 60) each; needs nightly Rust
	@hack/fuzz.sh

.PHONY: mutants
mutants: ## Break src/callback in every way and see its tests notice; half an hour, resumable
	@hack/mutants.sh

.PHONY: bench-receiver
bench-receiver: ## Measure the receiver beside bare axum on two cores; fails if a hard limit does not hold
	@$(CARGO) build --release --locked -p gemini-batch-bench
	"$(TARGET_DIR)/release/gemini-batch-bench"

.PHONY: generate
generate: ## Write the generated files anew (crds/)
	@mkdir -p crds
	$(CARGO) run --quiet --locked -- crd > crds/geminibatchjobs.yaml.new
	@mv crds/geminibatchjobs.yaml.new crds/geminibatchjobs.yaml

.PHONY: generated
generated: ## Fail if a committed generated file is not what the code generates
	@$(CARGO) run --quiet --locked -- crd | diff -u crds/geminibatchjobs.yaml - \
	  || { echo "crds/ differs from what the code generates: run 'make generate' and commit"; exit 1; }

CHART := charts/gemini-batch-operator

.PHONY: chart
chart: helm ## Lint the chart and render it: complete, valid and the same each time
	@helm="$$(hack/helm.sh)"
	rendered="$$(mktemp -d)"
	trap 'rm -rf "$$rendered"' EXIT
	"$$helm" lint --strict $(CHART)
	"$$helm" lint --strict $(CHART) --set watchNamespace=jobs
	for values in watchNamespace= watchNamespace=jobs; do
	  for time in 1 2; do "$$helm" template gbo $(CHART) --namespace gemini --set "$$values" > "$$rendered/$$time"; done
	  cmp "$$rendered/1" "$$rendered/2" || { echo "the chart renders differently each time: a GitOps tool would never be done"; exit 1; }
	done
	if "$$helm" lint $(CHART) --set noSuchValue=1 >/dev/null 2>&1; then
	  echo "values.schema.json lets an unknown value pass: a typo would be ignored"; exit 1
	fi

# ------------------------------------------------------------------------------------- internal

.PHONY: toolchain
toolchain:
	@for tool in cargo go python3; do command -v $$tool >/dev/null \
	  || { echo "$$tool is missing: this project builds with Rust (rustup.rs), Go (go.dev) and Python 3"; exit 1; }; done

# Before anything takes long: what the tests of the SDK need besides.
.PHONY: toolchain-sdk
toolchain-sdk:
	@tests/sdk/run.sh --check-tools

.PHONY: control-plane
control-plane:
	@hack/devcluster/ensure.sh >/dev/null

.PHONY: helm
helm:
	@hack/helm.sh >/dev/null

define run-demo
$(MAKE) toolchain control-plane
echo "== building the operator and the simulator (the first time takes a few minutes)"
$(CARGO) build --workspace --locked
devcluster="$$(hack/devcluster/ensure.sh)"
exec $(2) python3 hack/demo.py $(1) --devcluster "$$devcluster" --kubectl "$$(dirname "$$devcluster")/kubectl" \
  --operator "$(TARGET_DIR)/debug/gemini-batch-operator" --simulator "$(TARGET_DIR)/debug/gemini-simulator"
endef
