#!/usr/bin/env bash
# Train on a robot, or on its software twin: the robot moves on at 10 Hz while the learner learns.
#     bash examples/embodiment/run_realworld_async.sh realworld_sac_flow_image [key=value ...]
# On a machine without a GPU the twin takes the robot's place (profile cpu), without a clock unless told otherwise. All
# else is as in run_embodiment.sh; what a robot needs is in docs/realworld.md.
set -euo pipefail

name="${1:-realworld_sac_flow_image}"
shift || true
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_embodiment.sh" "$name" "$@"
