#!/usr/bin/env bash
# Runs the tests of the official Python SDK against the simulator at $GBO_SIMULATOR. Arguments go to pytest;
# --check-tools alone only tells whether this machine has what they need.
#
# The packages live in a venv under GBO_CACHE_DIR (default: the user's cache folder), in a directory named by
# a hash of what it is made from: requirements.txt and the Python it is for. It is built when there is none.
set -euo pipefail

readonly oldest=3.11 # what google-genai 3.4.0 asks for
readonly keep_unused_days=30

say() { echo "test-sdk: $*" >&2; }
die() { say "$*"; exit 1; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)

check_tools() {
  local tool
  for tool in python3 flock sha256sum; do
    command -v "$tool" >/dev/null ||
      die "'$tool' is missing: install Python $oldest or newer, util-linux (flock) and coreutils (sha256sum)"
  done
  python3 -c "import sys; sys.exit(sys.version_info < tuple(map(int, '$oldest'.split('.'))))" ||
    die "$(python3 --version) is too old: the SDK needs Python $oldest or newer as 'python3' on the PATH"
  # Debian ships venv without what it needs, so that `python3 -m venv` itself only fails half way.
  python3 -c 'import venv, ensurepip' 2>/dev/null ||
    die "python3 can't make a venv: install it (Debian, Ubuntu: apt install python3-venv)"
}

# A venv refers to its Python by path, and holds packages built for its version.
hash_sources() {
  { cat "$here/requirements.txt"; python3 -c 'import sys; print(sys.version, sys.executable)'; } |
    sha256sum | cut -c 1-32
}

# A venv can't be moved, since its scripts hold its path. So it is built in place, and a marker is written last:
# without the marker it is half-built and not used.
build() {
  local target=$1
  say "installing $(grep -c '==' "$here/requirements.txt") packages with pip; once, later runs are quick"
  SECONDS=0
  rm -rf "$target"
  python3 -m venv "$target"
  "$target/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off \
    --requirement "$here/requirements.txt" >&2 ||
    die "pip could not install them; see above (a first run needs access to a Python package index)"
  touch "$target/.complete"
  say "installed in ${SECONDS}s"
}

main() {
  local cache target
  check_tools
  [[ ${1:-} != --check-tools ]] || return 0
  [[ -n ${GBO_SIMULATOR:-} ]] || die "GBO_SIMULATOR is not set: run 'make test-sdk', which builds the simulator"
  [[ -x $GBO_SIMULATOR ]] || die "there is no simulator at $GBO_SIMULATOR: run 'make test-sdk', which builds it"
  GBO_SIMULATOR=$(cd "$(dirname "$GBO_SIMULATOR")" && pwd -P)/$(basename "$GBO_SIMULATOR")
  export GBO_SIMULATOR

  cache=${GBO_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:?neither GBO_CACHE_DIR nor HOME is set}/.cache}/gemini-batch-operator}
  mkdir -p "$cache"
  cache=$(cd "$cache" && pwd -P)
  target=$cache/sdk-$(hash_sources)

  if [[ ! -e $target/.complete ]]; then
    exec 9>"$cache/sdk.lock"
    if ! flock -n 9; then
      say "waiting for another run that installs the packages"
      flock 9
    fi
    if [[ ! -e $target/.complete ]]; then
      build "$target"
      find "$cache" -mindepth 1 -maxdepth 1 -type d -name 'sdk-*' -mtime "+$keep_unused_days" -exec rm -rf {} +
    fi
    exec 9>&-
  fi
  touch "$target"
  # No .pyc files and no cache of pytest in the sources.
  PYTHONDONTWRITEBYTECODE=1 exec "$target/bin/python" -m pytest -p no:cacheprovider --rootdir "$here" -v "$here" "$@"
}

main "$@"
