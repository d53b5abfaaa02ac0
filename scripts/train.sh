#!/usr/bin/env bash
# Train from nothing but Python 3.10+ and git: makes .venv if need be, then runs scripts/train.py with the overrides given.
#   bash scripts/train.sh                                          MiniLM on tweets, 0.5 % of its body chosen by Fisher information
#   bash scripts/train.sh mask=prune_gradual mask.sparsity=0.9
#   bash scripts/train.sh experiment=smollm2_reviews               a language model of 135 M parameters
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
case "$*" in
    *smollm2*) set_up lm ;; # with the language model: 93 MB more
    *) set_up demo ;;
esac
exec "$PYTHON" "$REPO/scripts/train.py" "$@"
