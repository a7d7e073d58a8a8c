#!/usr/bin/env bash
# Fuzzes every target of fuzz/, or those that are named:
#     hack/fuzz.sh [TARGET...]
# FUZZ_SECONDS (default 60) is for each target. Starts from fuzz/seeds and from what earlier runs found worth keeping;
# that, what a crash leaves behind, and the build are under GBO_CACHE_DIR, not in the clone.
set -euo pipefail

say() { echo "fuzz: $*" >&2; }
die() { say "$*"; exit 1; }

cd "$(dirname "${BASH_SOURCE[0]}")/.."
cache=${GBO_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:?neither GBO_CACHE_DIR nor HOME is set}/.cache}/gemini-batch-operator}/fuzz
mkdir -p "$cache"
seconds=${FUZZ_SECONDS:-60}
[[ $seconds =~ ^[1-9][0-9]*$ ]] || die "FUZZ_SECONDS must be a number of seconds, not '$seconds'"

command -v rustup >/dev/null ||
  die "rustup is missing: fuzzing needs a nightly Rust beside the stable one (rustup.rs, then 'rustup toolchain install nightly')"
rustup toolchain list | grep -q '^nightly' ||
  die "the nightly Rust toolchain is missing, and fuzzing needs it: run 'rustup toolchain install nightly'"
cargo_fuzz=$(hack/cargo-tool.sh cargo-fuzz)

targets=("$@")
if [[ ${#targets[@]} -eq 0 ]]; then
  for file in fuzz/targets/*.rs; do targets+=("$(basename "$file" .rs)"); done
fi

say "building (the first time takes some minutes)"
host=$(rustc +nightly -vV | awk '$1 == "host:" { print $2 }')
CARGO_TARGET_DIR=$cache/target PATH="$(dirname "$cargo_fuzz"):$PATH" \
  cargo +nightly fuzz build --fuzz-dir fuzz >&2

failed=()
for target in "${targets[@]}"; do
  [[ -f fuzz/targets/$target.rs ]] || die "there is no target '$target' in fuzz/targets"
  corpus=$cache/corpus/$target found=$cache/artifacts/$target log=$cache/$target.log
  mkdir -p "$corpus" "$found"
  if "$cache/target/$host/release/$target" "$corpus" "fuzz/seeds/$target" -max_total_time="$seconds" \
    -dict="fuzz/dictionaries/$target" -artifact_prefix="$found/" -timeout=10 -rss_limit_mb=2048 \
    -print_final_stats=1 >"$log" 2>&1; then
    runs=$(awk '/number_of_executed_units/ { print $2 }' "$log")
    [[ ${runs:-0} -gt 0 ]] || die "$target ran nothing; see $log"
    printf 'fuzz: %-10s %9d runs in %d s, nothing found\n' "$target" "$runs" "$seconds"
  else
    grep -vE '^#[0-9]+|^[[:space:]]*#[0-9]+ 0x' "$log" | tail -n 30 >&2
    say "$target FAILED; the input is in $found, all of the output in $log; again with that one input:"
    say "  $cache/target/$host/release/$target INPUT"
    failed+=("$target")
  fi
done
[[ ${#failed[@]} -eq 0 ]] || die "failed: ${failed[*]}"
