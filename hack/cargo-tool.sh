#!/usr/bin/env bash
# Prints the path of a cargo subcommand that only developers need, and installs it first when it is not there:
#     hack/cargo-tool.sh cargo-fuzz
# The versions are pinned here. They live under GBO_CACHE_DIR (default: the user's cache folder), each version in a
# folder of its own, and touch neither the clone nor ~/.cargo/bin. Only the path goes to stdout.
set -euo pipefail

die() { echo "cargo-tool: $*" >&2; exit 1; }

[[ $# -eq 1 ]] || die "usage: $0 cargo-cyclonedx|cargo-deny|cargo-fuzz|cargo-mutants"
tool=$1
flags=()
case $tool in
  # --debug: they work for seconds, so optimising them would take longer than it saves
  cargo-cyclonedx) version=0.5.9 flags=(--debug) ;;
  cargo-deny) version=0.20.2 flags=(--debug) ;;
  cargo-fuzz) version=0.13.2 ;;
  cargo-mutants) version=27.1.0 ;;
  *) die "$tool is not one of the tools that this project uses" ;;
esac

command -v cargo >/dev/null || die "cargo is missing: install Rust (rustup.rs)"
cache=${GBO_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:?neither GBO_CACHE_DIR nor HOME is set}/.cache}/gemini-batch-operator}
root=$cache/bin/$tool-$version

if [[ ! -x $root/bin/$tool ]]; then
  mkdir -p "$cache/bin"
  exec 9>"$cache/bin/.lock"
  if ! flock -n 9; then
    echo "cargo-tool: waiting for another installation to finish" >&2
    flock 9
  fi
  if [[ ! -x $root/bin/$tool ]]; then
    echo "cargo-tool: installing $tool $version (some minutes, once)" >&2
    begin=$SECONDS
    # the calling make may have its own target directory and flags: a tool is built apart from them
    env -u CARGO_TARGET_DIR -u RUSTFLAGS cargo install --quiet --locked "${flags[@]}" --root "$root" --version "$version" "$tool" >&2 ||
      die "could not install $tool $version; see above (it comes from the usual crate registry)"
    echo "cargo-tool: installed in $((SECONDS - begin)) s" >&2
  fi
fi
echo "$root/bin/$tool"
