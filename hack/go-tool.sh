#!/usr/bin/env bash
# Prints the absolute path of a program that is built by Go from its module, and builds it first when it is not there:
#     hack/go-tool.sh helm|versitygw|fake-gcs-server
# The versions are pinned here: so everything is checked with one version, on every machine, without prebuilt binaries.
# They live under GBO_CACHE_DIR (default: the user's cache folder), each version in a folder of its own. Only the path
# goes to stdout; messages go to stderr.
set -euo pipefail

readonly heartbeat_seconds=15

say() { echo "$tool: $*" >&2; }
die() { say "$*"; exit 1; }

tool=${1:-go-tool}
case $tool in
  helm) version=v4.3.1 package=helm.sh/helm/v4/cmd/helm ;;
  # the servers that tests of object stores talk to
  versitygw) version=v1.8.0 package=github.com/versity/versitygw/cmd/versitygw ;;
  fake-gcs-server) version=v1.56.1 package=github.com/fsouza/fake-gcs-server ;;
  *) die "usage: $0 helm|versitygw|fake-gcs-server" ;;
esac

# `local`: a Go that is too old says so, instead of downloading another one.
export CGO_ENABLED=0 GOTOOLCHAIN=local GOWORK=off GOFLAGS=

check_tools() {
  command -v go >/dev/null || die "Go is not installed: install Go 1.26 or newer and put 'go' on the PATH"
  command -v flock >/dev/null || die "'flock' is missing: install util-linux"
}

builder=
unfinished=
clean_up() {
  [[ -z $builder ]] || kill "$builder" 2>/dev/null || true
  [[ -z $unfinished ]] || rm -rf "$unfinished"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# Built in a directory of another name, then put in place at once.
build() {
  local target=$1 next_beat=$heartbeat_seconds
  unfinished=$(mktemp -d "$target.unfinished.XXXXXX")
  say "building $tool $version; the first build downloads its Go modules and takes a few minutes"
  SECONDS=0
  # Outside any module: what this repository's go.mod files say is not about it.
  (cd / && exec env GOBIN="$unfinished" go install -trimpath -ldflags '-s -w' "$package@$version") >&2 &
  builder=$!
  while kill -0 "$builder" 2>/dev/null; do
    sleep 1
    if ((SECONDS >= next_beat)); then
      say "still building, ${SECONDS}s"
      next_beat=$((SECONDS + heartbeat_seconds))
    fi
  done
  if ! wait "$builder"; then
    builder=
    die "the build failed after ${SECONDS}s; see above (a first build needs access to a Go module proxy, see 'go env GOPROXY')"
  fi
  builder=
  chmod 755 "$unfinished"
  rm -rf "$target"
  mv "$unfinished" "$target"
  unfinished=
  say "built in ${SECONDS}s"
}

main() {
  local cache target
  cache=${GBO_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:?neither GBO_CACHE_DIR nor HOME is set}/.cache}/gemini-batch-operator}
  mkdir -p "$cache"
  cache=$(cd "$cache" && pwd -P)
  target=$cache/$tool-$version

  if [[ ! -x $target/$tool ]]; then
    check_tools
    exec 9>"$cache/.$tool.lock"
    if ! flock -n 9; then
      say "waiting for another build to finish"
      flock 9
    fi
    if [[ ! -x $target/$tool ]]; then
      rm -rf "$target".unfinished.* # of builds that were killed: we hold the lock
      build "$target"
    fi
  fi
  echo "$target/$tool"
}

main
