#!/usr/bin/env bash
# Run the tests from nothing but Python 3.10+ and git; arguments go to pytest, e.g. `bash scripts/test.sh -m "not slow"`.
# Without any, two files run at a time, each on one thread.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up dev
cd "$REPO"
if [ $# -eq 0 ]; then
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  set -- -n 2 --dist loadfile
fi
exec "$PYTHON" -m pytest "$@"
