#!/usr/bin/env bash
# Sourced by the scripts beside it, with a recipe in $name: goes to the repository and enters its environment,
# installing first what the recipe needs and what an interrupted installation left out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

simulator="${name%%_*}"
stamp=.venv/rlinf-install.stamp # the installer writes it last; its lines name what is there
case "$simulator" in maniskill | frankasim | libero | realworld) needed="$simulator" ;; *) needed="" ;; esac
if [ ! -f "$stamp" ] || { [ -n "$needed" ] && ! grep -qx "$needed" "$stamp"; }; then
    bash requirements/install.sh embodied --env "$simulator"
fi
source .venv/bin/activate
