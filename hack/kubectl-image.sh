#!/usr/bin/env bash
# Writes DIRECTORY/kubectl.tar: kubectl as an image under the name that the examples use, for a node that reaches no
# registry. It is the one of hack/devcluster.
#     hack/kubectl-image.sh DIRECTORY
set -euo pipefail

[[ $# -eq 1 ]] || { echo "usage: $0 DIRECTORY" >&2; exit 1; }
mkdir -p "$1"
out=$(cd "$1" && pwd -P)
cd "$(dirname "${BASH_SOURCE[0]}")/.."

name=$(awk '$1 == "image:" { print $2; exit }' examples/dependent-job.yaml)
devcluster=$(hack/devcluster/ensure.sh)
programs=$(dirname "$devcluster")
cd hack/devcluster
CGO_ENABLED=0 GOFLAGS=-mod=readonly GOTOOLCHAIN=local GOWORK=off go run -trimpath ./mkimage \
  --out "$out/kubectl.tar" --name "$name" --program "$programs/pause" --file "/bin/kubectl=$programs/kubectl" \
  --max-mb 200
