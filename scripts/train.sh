#!/usr/bin/env bash
# Train from nothing but Python 3.10+ and git: makes .venv if need be, then runs scripts/train.py with the overrides given.
#   bash scripts/train.sh                                          MiniLM on tweets, 0.5 % of its body chosen by Fisher information
#   bash scripts/train.sh mask=prune_gradual mask.sparsity=0.9
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up demo
exec "$PYTHON" "$REPO/scripts/train.py" "$@"
