#!/usr/bin/env bash
# Prints the absolute path of a devcluster binary built from this folder, and
# builds it first when there is none yet. Beside it are symbolic links named
# etcd, kube-apiserver, kubectl and so on.
#
# The binary is cached under GBO_CACHE_DIR (default: the user's cache folder), in
# a directory named by a hash of everything it is made from. Only the path goes to
# stdout; messages go to stderr.
set -euo pipefail

readonly programs=(coredns etcd kube-apiserver kube-controller-manager kube-proxy kube-scheduler kubectl kubelet)
readonly heartbeat_seconds=15
readonly keep_unused_days=30

say() { echo "devcluster: $*" >&2; }
die() { say "$*"; exit 1; }

cd "$(dirname "${BASH_SOURCE[0]}")"

export CGO_ENABLED=0 GOFLAGS=-mod=readonly GOTOOLCHAIN=local GOWORK=off

# The first field after the keyword in go.mod.
from_go_mod() { awk -v key="$1" '$1 == key { print $2; exit }' go.mod; }

check_tools() {
  local wanted have tool
  wanted=$(from_go_mod go)
  command -v go >/dev/null ||
    die "Go is not installed: install Go $wanted or newer and put 'go' on the PATH"
  for tool in flock sha256sum awk; do
    command -v "$tool" >/dev/null ||
      die "'$tool' is missing: install util-linux (flock), coreutils (sha256sum) and awk"
  done
  # Asked outside the module: an older Go may not even read this go.mod.
  have=$(cd / && go env GOVERSION)
  have=${have#go}
  have=${have%%[ -]*}
  if [[ $have =~ ^[0-9] ]] && [[ $(printf '%s\n' "$wanted" "$have" | sort -V | head -n 1) != "$wanted" ]]; then
    die "Go $have is too old: install Go $wanted or newer"
  fi
}

sources() {
  find . -name testdata -prune -o -type f \
    \( -name '*.go' ! -name '*_test.go' -o -name '*.yaml' -o -name go.mod -o -name go.sum -o -name ensure.sh \) \
    -print | LC_ALL=C sort
}

hash_sources() {
  { go version; go env GOOS GOARCH; sources | xargs sha256sum; } | sha256sum | cut -c 1-32
}

# Kubernetes takes its version from the linker; the user agent is made from it too.
linker_flags() {
  local version major minor package flags='-s -w'
  version=$(from_go_mod k8s.io/kubernetes)
  IFS=. read -r major minor _ <<<"${version#v}"
  for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
    flags+=" -X $package.gitVersion=$version -X $package.gitMajor=$major -X $package.gitMinor=$minor"
  done
  echo "$flags"
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

# Everything is built in a directory of another name, then put in place at once.
build() {
  local target=$1 program next_beat=$heartbeat_seconds
  unfinished=$(mktemp -d "$target.unfinished.XXXXXX")
  say "building etcd $(from_go_mod go.etcd.io/etcd/server/v3) and Kubernetes $(from_go_mod k8s.io/kubernetes)"
  say "the first build downloads their Go modules and takes about five minutes; later ones are quick"
  SECONDS=0
  # "pause" is a program of its own: it goes into an image, and must be small.
  go build -buildvcs=false -trimpath -ldflags "$(linker_flags)" -o "$unfinished/" . ./pause >&2 &
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
  for program in "${programs[@]}"; do
    ln -s devcluster "$unfinished/$program"
  done
  chmod 755 "$unfinished"
  rm -rf "$target"
  mv "$unfinished" "$target"
  unfinished=
  say "built in ${SECONDS}s"
}

main() {
  local cache root target
  check_tools
  cache=${GBO_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:?neither GBO_CACHE_DIR nor HOME is set}/.cache}/gemini-batch-operator}
  root=$cache/devcluster
  mkdir -p "$root"
  root=$(cd "$root" && pwd -P)
  target=$root/$(hash_sources)

  if [[ ! -x $target/devcluster ]]; then
    exec 9>"$root/.lock"
    if ! flock -n 9; then
      say "waiting for another build to finish"
      flock 9
    fi
    if [[ ! -x $target/devcluster ]]; then
      rm -rf "$root"/*.unfinished.* # of builds that were killed: we hold the lock
      build "$target"
      find "$root" -mindepth 1 -maxdepth 1 -type d -mtime "+$keep_unused_days" -exec rm -rf {} +
    fi
  fi
  touch "$target"
  echo "$target/devcluster"
}

main "$@"
