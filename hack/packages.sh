#!/usr/bin/env bash
# Sees that the programs are there that this project takes from the system's packages, for one purpose:
#     hack/packages.sh node     # what 'devcluster up --node' needs
#     hack/packages.sh image    # what 'make image' needs
# What is missing is installed by apt-get if CI=true or GBO_INSTALL_PACKAGES=1, and we are root; else it says how.
set -euo pipefail

say() { echo "packages: $*" >&2; }
die() { say "$*"; exit 1; }

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# A program or a file (or one of several), and the Debian package it is in.
node=(
  containerd=containerd
  ctr=containerd
  runc=runc
  iptables-restore=iptables
  '/usr/lib/cni/ptp|/opt/cni/bin/ptp|/usr/libexec/cni/ptp=containernetworking-plugins'
)
image=(
  musl-gcc=musl-tools
  /usr/share/ca-certificates/mozilla=ca-certificates
)

case ${1:-} in
  node) needs=("${node[@]}") ;;
  image) needs=("${image[@]}") ;;
  *) die "usage: $0 node|image" ;;
esac

there() {
  local what alternatives
  IFS='|' read -ra alternatives <<<"$1"
  for what in "${alternatives[@]}"; do
    if [[ -e $what ]] || command -v "$what" >/dev/null; then return 0; fi
  done
  return 1
}

missing_packages() {
  local need
  for need in "${needs[@]}"; do
    there "${need%=*}" || echo "${need#*=}"
  done | sort -u
}

mapfile -t missing < <(missing_packages)
((${#missing[@]})) || exit 0
install=(apt-get install -y --no-install-recommends "${missing[@]}")

if [[ ${CI:-} != true && ${GBO_INSTALL_PACKAGES:-} != 1 ]]; then
  die "missing: ${missing[*]}. On Debian or Ubuntu, as root:
  ${install[*]}
or set GBO_INSTALL_PACKAGES=1 to have it done."
fi
command -v apt-get >/dev/null || die "missing: ${missing[*]} (Debian's names), and there is no apt-get here: install them by hand"
[[ $EUID -eq 0 ]] || die "missing: ${missing[*]}. Only root can install them: ${install[*]}"
say "installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# With lists that are missing or old, the first attempt fails.
"${install[@]}" >&2 || { apt-get update >&2 && "${install[@]}" >&2; } || die "apt-get could not install ${missing[*]}; see above"
mapfile -t missing < <(missing_packages)
((${#missing[@]} == 0)) || die "${missing[*]} is installed, but what is needed of it is not where it is looked for"
