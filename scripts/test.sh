#!/usr/bin/env bash
# Run the tests from nothing but Python 3.10+ and git; arguments go to pytest, e.g. `bash scripts/test.sh -m "not slow"`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up dev
cd "$REPO"
exec "$PYTHON" -m pytest "$@"
