#!/usr/bin/env bash
# Train every fold of a recipe: bash dist_train.sh NUM_GPUS conf/RECIPE.yaml [key=value ...]
# On several nodes set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT on each. --help lists every key.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=python
[ -x "$here/../.venv/bin/python" ] && [ -z "${VIRTUAL_ENV:-}" ] && python="$here/../.venv/bin/python"
exec "$python" -m kutils train-folds "$@"  # exec: a signal reaches the launcher, which stops the ranks in order
