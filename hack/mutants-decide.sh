#!/usr/bin/env bash
# Changes the decisions (src/controller/decide.rs and decide/) in every way that cargo-mutants knows, one at a time,
# and sees whether their table tests notice. Prints what survived, and fails if something did. Takes twenty
# minutes, and can be interrupted: what was caught is not tried again, unless the line it is in has moved.
#     hack/mutants-decide.sh [OPTIONS of cargo mutants]
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
cache=${GBO_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:?neither GBO_CACHE_DIR nor HOME is set}/.cache}/gemini-batch-operator}/mutants-decide
cargo_mutants=$(hack/cargo-tool.sh cargo-mutants)

section() { sed -n "/^\[$1\]/,/^\$/p" Cargo.toml; }

# The pure part of the controller, in a tree of its own: a mutant then costs seconds, not the build of the whole
# operator; and the clone is never touched. What it stands on is a crate of its own there, which is built once.
tree=$cache/tree
rm -rf "$tree"
mkdir -p "$tree/src/controller" "$tree/base" "$tree/.cargo"
cp .cargo/mutants.toml "$tree/.cargo/mutants.toml"
cp Cargo.lock "$tree/Cargo.lock"
cp -r src/api src/gemini src/store "$tree/base/"
printf 'pub mod api;\npub mod gemini;\npub mod store;\n' >"$tree/base/lib.rs"
{
  printf '[package]\nname = "base"\nedition = "2024"\n[lib]\npath = "lib.rs"\n'
  section dependencies
} >"$tree/base/Cargo.toml"

modules='collect|decide|destination|ending|identity|input|join|keys|memory|report|request|retry|shards|transfers|watched'
for module in ${modules//|/ }; do
  cp -r "src/controller/$module"* "$tree/src/controller/"
done
# Of these only what needs no client.
sed -i -E '/^pub mod (act|family|merge|parts);/d' "$tree/src/controller/shards/mod.rs"
rm "$tree"/src/controller/shards/{act,family,merge,parts}.rs
sed -E "/^pub mod /{/ ($modules);/!d}" src/controller/mod.rs >"$tree/src/controller/mod.rs"
printf 'pub use base::{api, gemini, store};\npub mod controller;\n' >"$tree/src/lib.rs"
{
  printf '[package]\nname = "decisions"\nedition = "2024"\n[workspace]\n'
  section workspace.dependencies
  section dependencies
  printf '[dependencies.base]\npath = "base"\n[dev-dependencies]\nproptest = "1"\n[profile.mutants]\ninherits = "dev"\ndebug = false\n'
} >"$tree/Cargo.toml"

code=0
# Without the property tests: which mutants they notice depends on chance.
PATH="$(dirname "$cargo_mutants"):$PATH" CARGO_TARGET_DIR=$cache/target CARGO_INCREMENTAL=1 \
  cargo mutants --dir "$tree" --in-place --output "$cache" --iterate --profile mutants \
  --file src/controller/decide.rs --file 'src/controller/decide/*.rs' \
  --timeout 30 --no-shuffle --colors never "$@" -- --lib -- controller::decide controller::shards --skip property || code=$?

# 3: nothing survived, but some made the tests hang, which nobody would overlook either
[[ $code -eq 0 || $code -eq 3 ]] || exit "$code"
