#!/usr/bin/env bash
# Prints the absolute path of a helm binary, and builds it first when there is none yet: see go-tool.sh.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/go-tool.sh" helm
