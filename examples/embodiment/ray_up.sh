#!/usr/bin/env bash
# Make this machine take part in runs over several machines (docs/cluster.md):
#     bash examples/embodiment/ray_up.sh head   [--name N] [--address IP] [--label KEY=VALUE]... [--resource NAME=COUNT]...
#     bash examples/embodiment/ray_up.sh worker HEAD_IP[:PORT] [the same options]
#     bash examples/embodiment/ray_up.sh down
# --resource Franka=1 says that a robot is on this machine: one run of the cluster at a time then gets it.
# --address is the address under which the other machines reach this one, where it has several. All machines need the
# same token, which the head makes: the file that it names. Ray listens on all interfaces and answers who has the token.
set -euo pipefail

readonly PORT=6379
die() {
    printf 'ray_up: %s\n' "$*" >&2
    exit 2
}

usage() { sed -n '3,6p' "${BASH_SOURCE[0]}" | sed 's/^# *//'; }
for word in "$@"; do
    case $word in -h | --help) usage && exit 0 ;; esac
done

kind=${1:-}
shift || true
case $kind in
    head) ;;
    down) [ $# -eq 0 ] || die "down ends Ray on this machine and takes nothing else, but was given '$1'" ;;
    worker)
        head=${1:-}
        [[ -n $head && $head != --* ]] || die "worker needs the address of the head, as its ray_up.sh printed it"
        shift
        [[ $head == *:* ]] || head=$head:$PORT
        ;;
    *) usage >&2 && die "the first argument is head, worker or down" ;;
esac

name=$(hostname) address="" labels="" resources=""
while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || die "$1 needs a value"
    case $1 in
        --name) name=$2 ;;
        --address) address=$2 ;;
        --label) [[ $2 == *=* ]] || die "--label $2: write KEY=VALUE" && labels+=${labels:+,}$2 ;;
        --resource)
            [[ $2 =~ ^[^=]+=[0-9]+$ ]] || die "--resource $2: write NAME=COUNT"
            resources+="${resources:+, }\"${2%=*}\": ${2##*=}"
            ;;
        *) die "unknown option '$1'" ;;
    esac
    shift 2
done

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ -x .venv/bin/ray ] || die "Ray is not installed here; run: bash requirements/install.sh embodied --ray"
source .venv/bin/activate
# What Ray is started with here, the run's processes see here.
export MUJOCO_GL="${MUJOCO_GL:-egl}" PYOPENGL_PLATFORM="${PYOPENGL_PLATFORM:-egl}"
export RAY_USAGE_STATS_ENABLED=0
# Processes of a run work at the priority of everything else; Ray would run them at niceness 15.
export RAY_worker_niceness="${RAY_worker_niceness:-0}"
# The patch version of Python may differ between a server and a robot's machine; the minor one may not.
export RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL=minor
if [ "$kind" = down ]; then
    exec ray stop
fi
# A machine behind a cable that is cut is given up after half a minute instead of more than one, and what runs there
# ends by itself in less than two minutes instead of four (benchmarks/two_machines.py).
export RAY_health_check_timeout_ms="${RAY_health_check_timeout_ms:-5000}"
export RAY_health_check_failure_threshold="${RAY_health_check_failure_threshold:-4}"
export RAY_grpc_client_keepalive_time_ms="${RAY_grpc_client_keepalive_time_ms:-10000}"
export RAY_grpc_client_keepalive_timeout_ms="${RAY_grpc_client_keepalive_timeout_ms:-10000}"
export RAY_gcs_rpc_server_reconnect_timeout_s="${RAY_gcs_rpc_server_reconnect_timeout_s:-30}"

token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
export RAY_AUTH_MODE=token
options=(--node-name="$name" --disable-usage-stats)
[ -z "$labels" ] || options+=(--labels="$labels")
[ -z "$resources" ] || options+=(--resources="{$resources}")

if [ "$kind" = head ]; then
    [ -s "$token" ] || ray get-auth-token --generate >/dev/null
    ray start --head --port="$PORT" ${address:+--node-ip-address="$address"} --include-dashboard=false "${options[@]}" >/dev/null
    printf 'This machine is the head, as %s.\n' "$name"
    printf 'Copy %s to the same place on every other machine (readable by its owner alone) and run there:\n' "$token"
    printf '    bash examples/embodiment/ray_up.sh worker %s:%s\n' "${address:-$(hostname -I | cut -d' ' -f1)}" "$PORT"
    exit 0
fi

[ -s "$token" ] || die "$token is missing; copy it from the head"
# Ray itself would try for minutes before it says so.
timeout 5 bash -c ": </dev/tcp/${head%:*}/${head##*:}" 2>/dev/null ||
    die "nobody answers at $head; start the head first: bash examples/embodiment/ray_up.sh head --address IP"
[ -z "$address" ] || options+=(--node-ip-address="$address")
ray start --address="$head" "${options[@]}" >/dev/null
printf '%s takes part in the cluster of %s.\n' "$name" "$head"
