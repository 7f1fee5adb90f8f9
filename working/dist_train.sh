#!/usr/bin/env bash
# Train every fold of a recipe: bash dist_train.sh NUM_GPUS conf/RECIPE.yaml [key=value ...]
# On several nodes set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT on each. --help lists every key.
set -euo pipefail
clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=python
[ -x "$clone/.venv/bin/python" ] && [ -z "${VIRTUAL_ENV:-}" ] && python="$clone/.venv/bin/python"
export PYTHONPATH="$clone${PYTHONPATH:+:$PYTHONPATH}"  # this clone's code, whichever is installed
exec "$python" -P -m kutils train-folds "$@"  # exec: a signal reaches the launcher, which stops the ranks in order
