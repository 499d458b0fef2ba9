#!/usr/bin/env bash
# Train a recipe asynchronously: environments and learner work on and on, neither waiting for the other.
#     bash examples/embodiment/run_async.sh frankasim_sac_cnn_async [key=value ...]
# All else is as in run_embodiment.sh.
set -euo pipefail

name="${1:-frankasim_sac_cnn_async}"
shift || true
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_embodiment.sh" "$name" runner.asynchronous=True "$@"
