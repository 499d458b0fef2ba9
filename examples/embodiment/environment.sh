#!/usr/bin/env bash
# Sourced by the scripts beside it, with a recipe in $name and the script's other arguments: goes to the repository and
# enters its environment, installing first what the recipe needs and what an interrupted installation left out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

simulator="${name%%_*}"
stamp=.venv/rlinf-install.stamp # the installer writes it last; its lines name what is there
options=(--env "$simulator")
case "$simulator" in maniskill | frankasim | libero | realworld) needed=("$simulator") ;; *) needed=() ;; esac
case "$name" in *openpi*) options+=(--model openpi) && needed+=(openpi) ;; esac
case "$name $*" in
    *sft_openpi* | *co_training* | *"--format lerobot"* | *"--format both"*) options+=(--lerobot) && needed+=(lerobot) ;;
esac
missing=no
for part in ${needed[@]+"${needed[@]}"}; do
    grep -qsx "$part" "$stamp" || missing=yes
done
if [ ! -f "$stamp" ] || [ "$missing" = yes ]; then
    bash requirements/install.sh embodied "${options[@]}"
fi
source .venv/bin/activate
