#!/usr/bin/env bash
# Builds the operator and the simulator as static programs for this machine's architecture, and packs each into a
# container image FROM scratch:
#     hack/image.sh DIRECTORY
# writes DIRECTORY/gemini-batch-operator.tar and DIRECTORY/gemini-simulator.tar, archives that 'docker load',
# 'podman load', 'ctr images import' and 'devcluster image load' take. No docker is needed. The Dockerfile makes the
# same images for those who have it.
set -euo pipefail

readonly max_mb=25

say() { echo "image: $*" >&2; }
die() { say "$*"; exit 1; }

[[ $# -eq 1 ]] || die "usage: $0 DIRECTORY"
mkdir -p "$1"
out=$(cd "$1" && pwd -P)
cd "$(dirname "${BASH_SOURCE[0]}")/.."

target=$(uname -m)-unknown-linux-musl
version=$(awk -F '"' '/^version = / { print $2; exit }' Cargo.toml)

if [[ ! -d $(rustc --print target-libdir --target "$target") ]]; then
  command -v rustup >/dev/null ||
    die "Rust's standard library for $target is missing, and there is no rustup to add it: install Rust from rustup.rs"
  rustup target add "$target" >&2
fi

# The operator looks for authorities in /etc/ssl/certs/ca-certificates.crt (or in what SSL_CERT_FILE names, for those
# with an authority of their own), and does not start without any.
# Mozilla's authorities as the distribution ships them, not the bundle in /etc/ssl: that one also has what this
# machine's administrator added.
certificates=$out/ca-certificates.crt
if [[ -n ${CA_CERTIFICATES:-} ]]; then
  cat "$CA_CERTIFICATES" >"$certificates"
else
  cat /usr/share/ca-certificates/mozilla/*.crt >"$certificates" ||
    die "there are no CA certificates: install the package ca-certificates, or name a PEM file in CA_CERTIFICATES"
fi

say "building for $target"
begin=$SECONDS
cargo build --release --locked --target "$target" -p gemini-batch-operator -p gemini-simulator
say "built in $((SECONDS - begin)) s"

# Of the commit, so that the same sources make the same image.
created=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}
revision=$(git describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null || echo unknown)

pack() { # PROGRAM TITLE
  (
    cd hack/devcluster
    CGO_ENABLED=0 GOFLAGS=-mod=readonly GOTOOLCHAIN=local GOWORK=off go run -trimpath ./mkimage \
      --out "$out/$1.tar" --name "$1:$version" --program "$programs/$1" --max-mb "$max_mb" --created "$created" \
      --file "/etc/ssl/certs/ca-certificates.crt=$certificates" \
      --label "org.opencontainers.image.title=$1" \
      --label "org.opencontainers.image.description=$2" \
      --label "org.opencontainers.image.version=$version" \
      --label "org.opencontainers.image.revision=$revision" \
      --label "org.opencontainers.image.licenses=Apache-2.0"
  )
}

programs=$(cargo metadata --no-deps --format-version 1 | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/$target/release
pack gemini-batch-operator "Gemini batch jobs as Kubernetes resources"
pack gemini-simulator "The Gemini batch API as far as it is known, for tests and demos"
