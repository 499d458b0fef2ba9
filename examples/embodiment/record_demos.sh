#!/usr/bin/env bash
# Record demonstrations for a recipe, installing what is missing first:
#     bash examples/embodiment/record_demos.sh maniskill_sac_flow_rlpd [--episodes 50] [--checkpoint RUN] [key=value ...]
# With --format lerobot it becomes a LeRobot data set (docs/datasets.md). Relative paths start at the repository. A recording that was stopped goes on with the same command.
set -euo pipefail

name="${1:-maniskill_sac_flow_rlpd}"
shift || true
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec python examples/embodiment/record_demos.py --config-name "$name" "$@"
