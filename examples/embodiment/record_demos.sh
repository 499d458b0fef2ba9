#!/usr/bin/env bash
# Record demonstrations for a recipe, installing what is missing first:
#     bash examples/embodiment/record_demos.sh maniskill_sac_flow_rlpd [--episodes 50] [--checkpoint RUN] [key=value ...]
# Relative paths start at the repository. A recording that was stopped goes on with the same command.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

name="${1:-maniskill_sac_flow_rlpd}"
shift || true
[ -d .venv ] || bash requirements/install.sh embodied --env "${name%%_*}"
source .venv/bin/activate
exec python examples/embodiment/record_demos.py --config-name "$name" "$@"
