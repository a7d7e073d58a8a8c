# Every target does its own set-up. Caches live outside the clone: in CARGO_TARGET_DIR if set, and in
# GBO_CACHE_DIR (default ~/.cache/gemini-batch-operator) for the control plane, helm and the Python packages.

SHELL := bash
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

export GBO_CACHE_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/gemini-batch-operator
IMAGES_DIR ?= $(TARGET_DIR)/images
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
test: toolchain toolchain-sdk control-plane helm store-servers ## Run all tests: unit, property, a real API server, the official Python SDK
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
	cd "$(CURDIR)"
	$(call run-dependents)
	$(MAKE) test-sdk

.PHONY: test-dependents
test-dependents: toolchain toolchain-sdk control-plane helm ## Only the tests of examples/dependents and docs/dependents.md (a part of test)
	@echo "== Dependents: kube-rs, Python, shell, Argo's manifest and helm --wait, against real objects"
	export GBO_DEVCLUSTER="$$(hack/devcluster/ensure.sh)" GBO_HELM="$$(hack/helm.sh)"
	$(CARGO) test --workspace --locked --features crash-points --test operator --test starts -- dependent without_a_cluster wait_and_read
	$(call run-dependents)

.PHONY: test-sdk
test-sdk: toolchain-sdk ## The official Python SDK against the simulator
	@echo "== The official Python SDK against the simulator"
	$(CARGO) build -p gemini-simulator --locked
	GBO_SIMULATOR="$(TARGET_DIR)/debug/gemini-simulator" tests/sdk/run.sh

.PHONY: test-node
test-node: toolchain node-packages control-plane ## Test the cluster that runs pods (devcluster up --node); needs root
	@echo "== Go tests (a node: pods, services, DNS, and what is left afterwards)"
	export DEVCLUSTER_BIN="$$(hack/devcluster/ensure.sh)" CGO_ENABLED=0 GOFLAGS=-mod=readonly
	cd hack/devcluster && go test -trimpath -count=1 -tags integration,node -run Node ./integration

.PHONY: image
image: toolchain ## Write the container images to target/images (IMAGES_DIR); needs no docker
	@hack/packages.sh image
	hack/image.sh "$(IMAGES_DIR)"

.PHONY: e2e
e2e: toolchain toolchain-sdk $(if $(E2E_KUBECONFIG),,node-packages) control-plane helm image ## The whole on a node: helm install, jobs, upgrade, killed pods, dependents, uninstall; needs root
	@echo "== end to end: the chart, the image, a node"
	export GBO_DEVCLUSTER="$$(hack/devcluster/ensure.sh)" GBO_HELM="$$(hack/helm.sh)" GBO_E2E_IMAGES="$(IMAGES_DIR)"
	hack/kubectl-image.sh "$(IMAGES_DIR)"
	$(CARGO) build --locked -p dependent-kube-rs
	export GBO_E2E_DEPENDENT="$(TARGET_DIR)/debug/dependent-kube-rs"
	export GBO_E2E_PYTHON="$$(hack/venv.sh dependents examples/dependents/python/requirements.txt)"
	$(if $(E2E_KUBECONFIG),export E2E_KUBECONFIG="$(E2E_KUBECONFIG)" E2E_LOAD="$(E2E_LOAD)")
	$(CARGO) test --locked --test e2e

.PHONY: sbom
sbom: toolchain ## Write a CycloneDX list of what is in the image beside it
	@hack/sbom.sh "$(IMAGES_DIR)/gemini-batch-operator.cdx.json"

# ------------------------------------------------------------------------------- for developers

.PHONY: check
check: fmt lint generated ## Format, lints and generated files, as CI checks them

.PHONY: fmt
fmt: ## Fail if the sources are not formatted
	$(CARGO) fmt --all --check
	$(CARGO) fmt --all --check --manifest-path fuzz/Cargo.toml
	@unformatted="$$(gofmt -l hack tests)"; if [ -n "$$unformatted" ]; then echo "gofmt: $$unformatted"; exit 1; fi

.PHONY: lint
lint: ## clippy and go vet, warnings are errors
	$(CARGO) clippy --workspace --all-targets --locked --features crash-points,break-submission -- -D warnings
	export CGO_ENABLED=0
	(cd hack/devcluster && go vet -trimpath -tags integration,node ./...)
	(cd tests/dependents && go vet -trimpath ./...)
	cd tests/chart && go vet -trimpath ./...

.PHONY: deny
deny: ## Licences, banned and duplicate crates, sources (deny.toml)
	@"$$(hack/cargo-tool.sh cargo-deny)" --locked --workspace check -D unmatched-skip -D license-not-encountered \
	  licenses bans sources

.PHONY: deny-advisories
deny-advisories: ## Known vulnerabilities; fetches the RustSec database, which is a git repository
	@"$$(hack/cargo-tool.sh cargo-deny)" --locked --workspace check advisories

.PHONY: fuzz
fuzz: ## Fuzz the parsers of outside bytes, FUZZ_SECONDS (default 60) each; needs nightly Rust
	@hack/fuzz.sh

.PHONY: mutants
mutants: ## Break src/callback in every way and see its tests notice; half an hour, resumable
	@hack/mutants.sh

.PHONY: mutants-decide
mutants-decide: ## The same for the decisions of the controller; twenty minutes, resumable
	@hack/mutants-decide.sh

.PHONY: bench
bench: toolchain control-plane ## Measure the operator with 10,000 jobs on a real API server; fails if a hard limit does not hold
	@$(CARGO) build --release --locked --workspace
	devcluster="$$(hack/devcluster/ensure.sh)"
	release="$(TARGET_DIR)/release"
	"$$release/gemini-batch-bench" operator --devcluster "$$devcluster" --operator "$$release/gemini-batch-operator" \
	  --simulator "$$release/gemini-simulator" $(BENCH_ARGS)

.PHONY: bench-receiver
bench-receiver: ## Measure the receiver beside bare axum on two cores; fails if a hard limit does not hold
	@$(CARGO) build --release --locked --workspace
	"$(TARGET_DIR)/release/gemini-batch-bench" receiver

.PHONY: bench-io
bench-io: toolchain control-plane ## Measure a job of 1 GB from and to a local S3 server beside a plain copy; fails if a hard limit does not hold
	@$(CARGO) build --release --locked -p gemini-batch-operator -p gemini-simulator -p gemini-batch-bench
	devcluster="$$(hack/devcluster/ensure.sh)"
	store="$$(hack/go-tool.sh versitygw)"
	release="$(TARGET_DIR)/release"
	"$$release/gemini-batch-bench" io --devcluster "$$devcluster" --operator "$$release/gemini-batch-operator" \
	  --simulator "$$release/gemini-simulator" --store "$$store" $(BENCH_ARGS)

.PHONY: chaos
chaos: toolchain control-plane ## Kill the operator 1,000 times at every step, with everything else failing (KILLS, SEED)
	@$(build-chaos)
	$(run-chaos) --kills $(or $(KILLS),1000) $(if $(SEED),--seed $(SEED))

.PHONY: chaos-ci
chaos-ci: toolchain control-plane ## The same for a minute from a fixed seed, and proof that it can fail
	@$(build-chaos)
	$(run-chaos) --can-fail
	$(run-chaos) --kills 40 --least 15 --window 2 --minutes 2 --cells 4 --seed 1

.PHONY: chaos-can-fail
chaos-can-fail: toolchain control-plane ## Leave out grace, fence and adoption in turn, and see a batch too many each time
	@$(build-chaos)
	$(run-chaos) --can-fail

.PHONY: generate
generate: ## Write the generated files anew (crds/, the chart's copy of it, the table in the chart's README)
	@mkdir -p crds
	$(CARGO) run --quiet --locked -- crd > crds/geminibatchjobs.yaml.new
	@mv crds/geminibatchjobs.yaml.new crds/geminibatchjobs.yaml
	@cp crds/geminibatchjobs.yaml charts/gemini-batch-operator/files/
	@hack/chart-readme.py

.PHONY: generated
generated: ## Fail if a committed generated file is not what the code generates
	@$(CARGO) run --quiet --locked -- crd | diff -u crds/geminibatchjobs.yaml - \
	  || { echo "crds/ differs from what the code generates: run 'make generate' and commit"; exit 1; }
	@cmp crds/geminibatchjobs.yaml charts/gemini-batch-operator/files/geminibatchjobs.yaml \
	  || { echo "the chart's definition is not that of crds/: run 'make generate' and commit"; exit 1; }
	@hack/chart-readme.py --check

.PHONY: chart
chart: toolchain helm control-plane ## Test the Helm chart: on a real API server, its alerts against a running operator
	@$(CARGO) build --workspace --locked
	export GBO_DEVCLUSTER="$$(hack/devcluster/ensure.sh)" GBO_HELM="$$(hack/helm.sh)"
	export GBO_OPERATOR="$(abspath $(TARGET_DIR))/debug/gemini-batch-operator"
	export GBO_SIMULATOR="$(abspath $(TARGET_DIR))/debug/gemini-simulator"
	export CGO_ENABLED=0 GOFLAGS=-mod=readonly GOTOOLCHAIN=local
	# Never from Go's cache: it knows nothing of the chart and the programs.
	cd tests/chart && go test -trimpath -count=1 ./...

# ------------------------------------------------------------------------------------- internal

.PHONY: toolchain
toolchain:
	@for tool in cargo go python3; do command -v $$tool >/dev/null \
	  || { echo "$$tool is missing: this project builds with Rust (rustup.rs), Go (go.dev) and Python 3"; exit 1; }; done

# Before anything takes long: what the tests of the SDK need besides.
.PHONY: toolchain-sdk
toolchain-sdk:
	@hack/venv.sh --check-tools

.PHONY: node-packages
node-packages:
	@hack/packages.sh node

.PHONY: control-plane
control-plane:
	@hack/devcluster/ensure.sh >/dev/null

.PHONY: helm
helm:
	@hack/helm.sh >/dev/null

# What tests of object stores talk to.
.PHONY: store-servers
store-servers:
	@hack/go-tool.sh versitygw >/dev/null
	@hack/go-tool.sh fake-gcs-server >/dev/null
	@hack/azurite.sh >/dev/null

# What other tools make of the objects that the Rust tests have taken from the API server a moment ago.
define run-dependents
echo "== Go tests (kstatus, Argo CD, Flux and Argo Workflows on real objects)"
(cd tests/dependents && GBO_DEPENDENT_OBJECTS="$(TARGET_DIR)/tmp/dependents" CGO_ENABLED=0 GOFLAGS=-mod=readonly go test -trimpath -count=1 ./...)
endef

# A build of its own: these features are for this alone, and no release has them.
define build-chaos
$(CARGO) build --locked -p gemini-batch-chaos
$(CARGO) build --locked -p gemini-batch-operator --features crash-points,break-submission
endef

run-chaos = GBO_DEVCLUSTER="$$(hack/devcluster/ensure.sh)" "$(TARGET_DIR)/debug/gemini-batch-chaos" \
  --operator "$(TARGET_DIR)/debug/gemini-batch-operator"

define run-demo
$(MAKE) toolchain control-plane
echo "== building the operator and the simulator (the first time takes a few minutes)"
$(CARGO) build --workspace --locked
devcluster="$$(hack/devcluster/ensure.sh)"
exec $(2) python3 hack/demo.py $(1) --devcluster "$$devcluster" --kubectl "$$(dirname "$$devcluster")/kubectl" \
  --operator "$(TARGET_DIR)/debug/gemini-batch-operator" --simulator "$(TARGET_DIR)/debug/gemini-simulator"
endef
