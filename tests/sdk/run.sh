#!/usr/bin/env bash
# Runs the tests of the official Python SDK against the simulator at $GBO_SIMULATOR. Arguments go to pytest.
set -euo pipefail

die() { echo "test-sdk: $*" >&2; exit 1; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)

[[ -n ${GBO_SIMULATOR:-} ]] || die "GBO_SIMULATOR is not set: run 'make test-sdk', which builds the simulator"
[[ -x $GBO_SIMULATOR ]] || die "there is no simulator at $GBO_SIMULATOR: run 'make test-sdk', which builds it"
GBO_SIMULATOR=$(cd "$(dirname "$GBO_SIMULATOR")" && pwd -P)/$(basename "$GBO_SIMULATOR")
export GBO_SIMULATOR

python=$("$here/../../hack/venv.sh" sdk "$here/requirements.txt")
# No .pyc files and no cache of pytest in the sources.
PYTHONDONTWRITEBYTECODE=1 exec "$python" -m pytest -p no:cacheprovider --rootdir "$here" -v "$here" "$@"
