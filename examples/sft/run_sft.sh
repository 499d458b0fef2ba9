#!/usr/bin/env bash
# Clone demonstrations into a policy, installing and recording what is missing first:
#     bash examples/sft/run_sft.sh maniskill_flow_bc [key=value ...]
# Relative paths start at the repository.
set -euo pipefail

name="${1:-maniskill_flow_bc}"
shift || true
source "$(dirname "${BASH_SOURCE[0]}")/../embodiment/environment.sh"

log_path="logs/$(date +%Y%m%d-%H%M%S)-$name"
exec python examples/sft/train.py --config-name "$name" "runner.logger.log_path=$log_path" "$@"
