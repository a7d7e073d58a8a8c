#!/usr/bin/env bash
# Prints the path of a python that has the packages of a requirements file, and installs them first when there is none.
#     hack/venv.sh NAME REQUIREMENTS
#     hack/venv.sh --check-tools      only tells whether this machine has what that needs
#
# The packages live in a venv under GBO_CACHE_DIR (default: the user's cache folder), in a directory named by
# a hash of what it is made from: the requirements and the Python it is for. Only the path goes to stdout.
set -euo pipefail

readonly oldest=3.11 # what google-genai 3.4.0 asks for
readonly keep_unused_days=30

name=venv
say() { echo "$name: $*" >&2; }
die() { say "$*"; exit 1; }

check_tools() {
  local tool
  for tool in python3 flock sha256sum; do
    command -v "$tool" >/dev/null ||
      die "'$tool' is missing: install Python $oldest or newer, util-linux (flock) and coreutils (sha256sum)"
  done
  python3 -c "import sys; sys.exit(sys.version_info < tuple(map(int, '$oldest'.split('.'))))" ||
    die "$(python3 --version) is too old: Python $oldest or newer is needed as 'python3' on the PATH"
  # Debian ships venv without what it needs, so that `python3 -m venv` itself only fails half way.
  python3 -c 'import venv, ensurepip' 2>/dev/null ||
    die "python3 can't make a venv: install it (Debian, Ubuntu: apt install python3-venv)"
}

# A venv refers to its Python by path, and holds packages built for its version.
hash_sources() {
  { cat "$1"; python3 -c 'import sys; print(sys.version, sys.executable)'; } | sha256sum | cut -c 1-32
}

# A venv can't be moved, since its scripts hold its path. So it is built in place, and a marker is written last:
# without the marker it is half-built and not used.
build() {
  local target=$1 requirements=$2
  say "installing $(grep -c '==' "$requirements") packages with pip; once, later runs are quick"
  SECONDS=0
  rm -rf "$target"
  python3 -m venv "$target"
  "$target/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off \
    --requirement "$requirements" >&2 ||
    die "pip could not install them; see above (a first run needs access to a Python package index)"
  touch "$target/.complete"
  say "installed in ${SECONDS}s"
}

main() {
  local cache target requirements
  check_tools
  [[ ${1:-} != --check-tools ]] || return 0
  [[ $# -eq 2 ]] || die "usage: $0 NAME REQUIREMENTS"
  name=$1
  requirements=$2

  cache=${GBO_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:?neither GBO_CACHE_DIR nor HOME is set}/.cache}/gemini-batch-operator}
  mkdir -p "$cache"
  cache=$(cd "$cache" && pwd -P)
  target=$cache/$name-$(hash_sources "$requirements")

  if [[ ! -e $target/.complete ]]; then
    exec 9>"$cache/$name.lock"
    if ! flock -n 9; then
      say "waiting for another run that installs the packages"
      flock 9
    fi
    if [[ ! -e $target/.complete ]]; then
      build "$target" "$requirements"
      find "$cache" -mindepth 1 -maxdepth 1 -type d -name "$name-*" -mtime "+$keep_unused_days" -exec rm -rf {} +
    fi
    exec 9>&-
  fi
  touch "$target"
  echo "$target/bin/python"
}

main "$@"
