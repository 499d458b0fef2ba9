#!/usr/bin/env bash
# Train a recipe of examples/embodiment/config, installing what is missing first:
#     bash examples/embodiment/run_embodiment.sh maniskill_sac_flow_state [key=value ...]
# Relative paths start at the repository. Everything the run says on stderr is kept in run_embodiment.log.
set -euo pipefail

name="${1:-maniskill_sac_flow_state}"
shift || true
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
export MUJOCO_GL="${MUJOCO_GL:-egl}" PYOPENGL_PLATFORM="${PYOPENGL_PLATFORM:-egl}"

log_path="logs/$(date +%Y%m%d-%H%M%S)-$name"
mkdir -p "$log_path"
# Signals must reach python alone and first, so it replaces this shell; tee outlives a Ctrl-C to record the end.
[ -t 1 ] || exec > >(tee -ia "$log_path/run_embodiment.log")
exec python examples/embodiment/train.py --config-name "$name" "runner.logger.log_path=$log_path" "$@" \
    2> >(tee -ia "$log_path/run_embodiment.log" >&2)
