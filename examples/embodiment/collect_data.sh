#!/usr/bin/env bash
# Record what a person does with the robot of a recipe, installing what is missing first:
#     bash examples/embodiment/collect_data.sh realworld_sac_flow_image --operator spacemouse [--episodes 20] [key=value ...]
# With --format lerobot or both it becomes a LeRobot data set, too. What was stopped goes on with the same command.
set -euo pipefail

name="${1:-realworld_sac_flow_image}"
shift || true
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec python -m rlinf collect "$name" "$@"
