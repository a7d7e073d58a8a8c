#!/usr/bin/env bash
# Changes src/callback in every way that cargo-mutants knows, one at a time, and sees whether its unit and property
# tests notice. Prints what survived, and fails if something did. Takes half an hour, and can be interrupted: what was
# caught is not tried again, unless the line it is in has moved.
#     hack/mutants.sh [OPTIONS of cargo mutants]
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
cache=${GBO_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:?neither GBO_CACHE_DIR nor HOME is set}/.cache}/gemini-batch-operator}/mutants
cargo_mutants=$(hack/cargo-tool.sh cargo-mutants)

# The module alone, in a tree of its own: a mutant then costs seconds, not the build of the whole operator; and the
# clone is never touched.
tree=$cache/tree
mkdir -p "$tree/src" "$tree/.cargo"
rm -rf "$tree/src/callback"
cp -r src/callback "$tree/src/callback"
cp .cargo/mutants.toml "$tree/.cargo/mutants.toml"
cp fuzz/Cargo.lock "$tree/Cargo.lock"
printf '#[path = "src/callback/mod.rs"]\npub mod callback;\n' >"$tree/lib.rs"
{
  cat fuzz/callback/Cargo.toml
  # dependencies are built once and then only run; the module is built every time
  printf '\n[workspace]\n[profile.mutants]\ninherits = "dev"\ndebug = false\n[profile.mutants.package."*"]\nopt-level = 2\n'
} >"$tree/Cargo.toml"

code=0
PATH="$(dirname "$cargo_mutants"):$PATH" CARGO_TARGET_DIR=$cache/target CARGO_INCREMENTAL=1 \
  cargo mutants --dir "$tree" --in-place --output "$cache" --iterate --profile mutants \
  --timeout 30 --no-shuffle --colors never "$@" || code=$?

# 3: nothing survived, but some made the tests hang, which nobody would overlook either
[[ $code -eq 0 || $code -eq 3 ]] || exit "$code"
