#!/usr/bin/env bash
# Installs what a recipe needs into a virtual environment, and says what it could not do.
#
#   bash requirements/install.sh embodied [--model M] [--env E]... [--hardware H]... [--ray] [--lerobot] [--use-mirror]
#       [--dev] [--bench] [--venv DIR]
#
# Safe to repeat (a second call returns at once), safe to interrupt (the next call goes on), and free of addresses:
# packages come from where pip and apt of this machine are told to look.

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly ROOT
readonly CONSTRAINTS=$ROOT/requirements/constraints-cpu.txt
readonly TORCH=torch==2.13.0
# Without what they ask for besides the extra `libero`: transformers, wandb, robomimic and by way of it another torch,
# none of which stepping a task needs.
readonly LIBERO="hf-libero==0.1.4 robosuite==1.4.0 bddl==1.0.1"
readonly OPTIONS="--env --model --hardware --ray --lerobot --use-mirror --dev --bench --venv --help"
readonly PYTHONS="python3.11 python3.12 python3.10 python3.13 python3"

# Everything that the five seed recipes name. "later" is accepted and reported: the recipe is not in this version.
readonly ENVS="maniskill reach maniskill_libero libero frankasim realworld franka"
readonly MODELS="mlp_policy flow_policy cnn_policy openpi openvla openvla_oft openvla-oft"
readonly ENVS_HERE="maniskill reach maniskill_libero libero frankasim realworld franka"
readonly HARDWARE="franky panda realsense usbcam spacemouse"
readonly MODELS_HERE="mlp_policy flow_policy cnn_policy openpi"

VENV=$ROOT/.venv
EXTRAS=()  # optional dependency groups of pyproject.toml
COULD_NOT=()  # lines of the closing report
NEEDS_VULKAN=no
NEEDS_EGL=no
NEEDS_LIBRARIES=no
USE_MIRROR=no

say() { printf '[install] %s\n' "$*"; }

die() {
    printf '[install] ERROR: %s\n' "$*" >&2
    exit 1
}

could_not() { COULD_NOT+=("$*"); }

usage() {
    cat <<TEXT
bash requirements/install.sh embodied [--model M] [--env E]... [--hardware H]... [--ray] [--lerobot] [--use-mirror]
    [--dev] [--bench] [--venv DIR]

  --env E       simulator to install, may be given several times: $ENVS
  --model M     model whose packages to install: $MODELS
  --hardware H  library of what is plugged into this machine, may be given several times: $HARDWARE
  --ray         Ray, for runs of several processes: more than one GPU or machine
  --lerobot     what LeRobot data sets are read and written with (pyarrow, PyAV)
  --use-mirror  take packages from the mirror named by RLINF_PIP_MIRROR or PIP_INDEX_URL
  --dev         also the tools of the tests (pytest, ruff, mypy)
  --bench       also what the benchmarks compare with (stable-baselines3)
  --venv DIR    virtual environment to make or complete (default: .venv of the repository)

PYTHON=/path/to/python3.11 chooses the interpreter. RLINF_DEVICE=cpu|cuda overrides the detection of a GPU.
TEXT
}

contains() { case " $2 " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

# --- arguments ------------------------------------------------------------------------------------------------

# The word of list $2 that is nearest to $1 in edit distance.
nearest() {
    tr ' ' '\n' <<<"$2" | awk -v want="$1" '
        function min3(a, b, c) { return a < b ? (a < c ? a : c) : (b < c ? b : c) }
        function distance(a, b,    i, j, d) {
            for (i = 0; i <= length(a); i++) d[i, 0] = i
            for (j = 0; j <= length(b); j++) d[0, j] = j
            for (i = 1; i <= length(a); i++)
                for (j = 1; j <= length(b); j++)
                    d[i, j] = min3(d[i - 1, j] + 1, d[i, j - 1] + 1,
                                   d[i - 1, j - 1] + (substr(a, i, 1) != substr(b, j, 1)))
            return d[length(a), length(b)]
        }
        { x = distance(want, $0); if (NR == 1 || x < best) { best = x; word = $0 } }
        END { print word }'
}

choose_env() {
    contains "$1" "$ENVS" || die "unknown --env '$1'; did you mean $(nearest "$1" "$ENVS")? Known: $ENVS"
    case $1 in
        maniskill | maniskill_libero) EXTRAS+=(maniskill) NEEDS_VULKAN=yes ;;
        frankasim) EXTRAS+=(frankasim) NEEDS_EGL=yes ;;
        realworld | franka) EXTRAS+=(realworld) NEEDS_EGL=yes ;;
    esac
    case $1 in
        libero | maniskill_libero) EXTRAS+=(libero) NEEDS_EGL=yes ;;
    esac
    contains "$1" "$ENVS_HERE" || could_not "--env $1: not in this version; nothing was installed for it"
}

choose_hardware() {
    contains "$1" "$HARDWARE" || die "unknown --hardware '$1'; did you mean $(nearest "$1" "$HARDWARE")? Known: $HARDWARE"
    EXTRAS+=("$1")
    NEEDS_LIBRARIES=yes
}

choose_model() {
    contains "$1" "$MODELS" || die "unknown --model '$1'; did you mean $(nearest "$1" "$MODELS")? Known: $MODELS"
    case $1 in
        openpi) EXTRAS+=(openpi) ;;
    esac
    contains "$1" "$MODELS_HERE" || could_not "--model $1: not in this version; nothing was installed for it"
}

parse_arguments() {
    case ${1:-} in
        embodied) shift ;;
        -h | --help) usage && exit 0 ;;
        *) usage >&2 && die "the first argument is the kind of installation; only 'embodied' exists" ;;
    esac
    while [ $# -gt 0 ]; do
        case $1 in
            --env | --model | --hardware | --venv) [ $# -ge 2 ] || die "$1 needs a value" ;;
        esac
        case $1 in
            --env) choose_env "$2" && shift 2 ;;
            --model) choose_model "$2" && shift 2 ;;
            --hardware) choose_hardware "$2" && shift 2 ;;
            --venv) VENV=$2 && shift 2 ;;
            --use-mirror) USE_MIRROR=yes && shift ;;
            --ray) EXTRAS+=(ray) && shift ;;
            --lerobot) EXTRAS+=(lerobot) && shift ;;
            --dev) EXTRAS+=(dev) && shift ;;
            --bench) EXTRAS+=(bench) && shift ;;
            -h | --help) usage && exit 0 ;;
            *) die "unknown argument '$1'; did you mean $(nearest "$1" "$OPTIONS")?" ;;
        esac
    done
    case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
}

choose_mirror() {
    [ "$USE_MIRROR" = yes ] || return 0
    if [ -n "${RLINF_PIP_MIRROR:-}" ]; then
        export PIP_INDEX_URL=$RLINF_PIP_MIRROR
    elif [ -z "${PIP_INDEX_URL:-}" ]; then
        could_not "--use-mirror: neither RLINF_PIP_MIRROR nor PIP_INDEX_URL names a mirror; used pip's own sources"
    fi
}

# --- system packages ------------------------------------------------------------------------------------------

# Runs a command as root, without ever asking for a password. Fails where that is not allowed.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        sudo -n "$@"
    else
        return 1
    fi
}

APT_IS_FRESH=no

apt_install() {
    command -v apt-get >/dev/null && as_root true || return 1
    if [ "$APT_IS_FRESH" = no ]; then
        as_root apt-get -qq update || true  # an unreachable side source must not hide a reachable main one
        APT_IS_FRESH=yes
    fi
    say "apt-get install $*"
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get -qq -o Dpkg::Use-Pty=0 install -y --no-install-recommends "$@" >/dev/null
}

# Package of Debian and Ubuntu that holds a shared library which some wheel expects on every system.
package_of_library() {
    case $1 in
        libGL.so.1) echo libgl1 ;;
        libEGL.so.1) echo libegl1 ;;
        libX11.so.6) echo libx11-6 ;;
        libXext.so.6) echo libxext6 ;;
        libSM.so.6) echo libsm6 ;;
        libICE.so.6) echo libice6 ;;
        libglib-2.0.so.0 | libgthread-2.0.so.0) echo libglib2.0-0 ;;
        libgomp.so.1) echo libgomp1 ;;
        libusb-1.0.so.0) echo libusb-1.0-0 ;;
        libudev.so.1) echo libudev1 ;;
        libstdc++.so.6) echo libstdc++6 ;;
    esac
}

# Names of the packages whose libraries the installed wheels look for in vain. Libraries that a wheel brings along
# also show as missing in ldd's eyes; the table above knows none of those.
missing_system_packages() {
    local library
    find "$(site_packages)"/{cv2,sapien,mplib,pyrealsense2} -name '*.so*' -exec ldd {} + 2>/dev/null |
        awk '/not found/ { print $1 }' | sort -u |
        while read -r library; do package_of_library "$library"; done | sort -u
}

install_libraries() {
    local packages
    mapfile -t packages < <(missing_system_packages)
    [ ${#packages[@]} -gt 0 ] || return 0
    apt_install "${packages[@]}" ||
        could_not "shared libraries that the simulator or the hardware needs: an administrator runs: apt-get install ${packages[*]}"
}

# --- Python ---------------------------------------------------------------------------------------------------

find_python() {
    local name
    for name in ${PYTHON:-} $PYTHONS; do
        # Running it, not only finding it: version managers leave names on the path that lead nowhere.
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$name"
            return
        fi
        [ "$name" != "${PYTHON:-}" ] || die "PYTHON=$PYTHON is no Python 3.10 or newer"
    done
    die "no Python 3.10 or newer found; install one, for example: apt-get install python3.11 python3.11-venv"
}

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

site_packages() { "$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

venv_works() { [ -f "$VENV/pyvenv.cfg" ] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; }

make_venv() {
    local python package
    if venv_works; then return; fi
    if [ -d "$VENV" ] && [ ! -f "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV")" ]; then
        die "$VENV exists and is no virtual environment; remove it or name another place with --venv"
    fi
    python=$(find_python)
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        package=python$(python_version "$python")-venv
        apt_install "$package" || die "$python cannot make virtual environments; first run: apt-get install $package"
    fi
    say "making $VENV with $python ($(python_version "$python"))"
    # Over the remains of an interrupted call this completes what is there.
    "$python" -m venv "$VENV" || die "$VENV could not be made; remove it and run this command again"
    venv_works || die "$VENV is damaged; remove it and run this command again"
}

# --- packages -------------------------------------------------------------------------------------------------

device() {
    if [ -n "${RLINF_DEVICE:-}" ]; then
        echo "$RLINF_DEVICE"
    elif command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
        echo cuda
    else
        echo cpu
    fi
}

# pip with its chatter in a log; the larger downloads are shown, so that a slow network does not look like a hang.
pip_install() {
    "$VENV/bin/python" -m pip install --disable-pip-version-check --progress-bar off "$@" 2>&1 | tee -a "$LOG" |
        awk '/^ *Downloading .* MB\)/ { print "          " $2, $3, $4; fflush() }'
}

pip_failed() {
    tail -n 15 "$LOG" >&2
    die "pip did not succeed; the whole log is $LOG. A network that failed: run the same command again"
}

# The requirement that gives a machine without a GPU its torch. Asked for without constraints: beside torch==2.13.0
# the resolver would report a conflict instead of a build that nobody offers.
cpu_torch() {
    if "$VENV/bin/python" -m pip install --quiet --dry-run --no-deps "$TORCH+cpu" >>"$LOG" 2>&1; then
        echo "$TORCH+cpu"
        return
    fi
    grep -q "No matching distribution found for $TORCH+cpu" "$LOG" || pip_failed
    say "no source of packages offers $TORCH+cpu, so this is the CUDA build: larger, and works here too." >&2
    say "PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS may name a source of CPU wheels." >&2
    echo "$TORCH"
}

install_packages() {
    local target=$ROOT extras=$1 torch=$TORCH constraints=$LOG.constraints
    [ -z "$extras" ] || target="${ROOT}[${extras}]"
    say "installing rlinf${extras:+[$extras]} for $(device); the first time this takes some minutes"
    pip_install --upgrade pip || pip_failed
    cp "$CONSTRAINTS" "$constraints"
    if [ "$(device)" = cpu ]; then
        torch=$(cpu_torch)
    else
        sed -i '/^torch==/d' "$constraints"
    fi
    pip_install -c "$constraints" "$torch" -e "$target" || pip_failed
    rm -f "$constraints"
}

# LIBERO is in the environment after this, and its first import will ask nothing. Its assets (206 MB) are not: whoever
# needs them is told so by the environment that misses them.
install_libero() {
    # shellcheck disable=SC2086  # three words
    pip_install --no-deps $LIBERO || pip_failed
    "$VENV/bin/python" -m rlinf.envs.libero.package >>"$LOG" 2>&1 ||
        could_not "LIBERO: it was installed and cannot be imported; see the end of $LOG"
}

check_torch() {
    local build usable
    read -r build usable < <("$VENV/bin/python" -c 'import torch
print("cuda" if torch.version.cuda else "cpu", "yes" if torch.cuda.is_available() else "no")') ||
        die "torch was installed and does not start; the message stands above"
    if [ "$(device)" = cuda ] && [ "$build" = cpu ]; then
        could_not "CUDA: pip's sources gave the CPU build of torch; PIP_EXTRA_INDEX_URL may name one of CUDA wheels"
    elif [ "$(device)" = cuda ] && [ "$usable" = no ]; then
        could_not "CUDA: torch finds no usable device; its build may need a newer driver than nvidia-smi shows"
    fi
}

# --- Vulkan ---------------------------------------------------------------------------------------------------

# Whether SAPIEN can open a renderer on device $1 ("cpu" or "cuda").
renders_on() {
    "$VENV/bin/python" -W ignore -c 'import sys, sapien; sapien.render.RenderSystem(sapien.Device(sys.argv[1]))' "$1" \
        >/dev/null 2>&1
}

install_vulkan() {
    local place=$VENV/share/lavapipe
    if [ "$(device)" = cuda ] && renders_on cuda; then return; fi
    if [ -f "$place/lvp.json" ] && VK_ICD_FILENAMES=$place/lvp.json renders_on cpu; then return; fi
    say "setting up software Vulkan for pictures without a GPU"
    if ! bash "$ROOT/requirements/software_vulkan.sh" "$place" 2>&1 | tee -a "$LOG"; then
        could_not "software Vulkan: see the line above; training works without, eval videos do not"
    elif ! VK_ICD_FILENAMES=$place/lvp.json renders_on cpu; then
        rm -f "$place/lvp.json"
        could_not "software Vulkan: the driver is there but SAPIEN cannot use it (too old a Mesa?); no eval videos"
    fi
}

# --- EGL ------------------------------------------------------------------------------------------------------

# Whether MuJoCo can draw without a display.
draws_through_egl() {
    MUJOCO_GL=egl "$VENV/bin/python" -W ignore -c 'import mujoco; mujoco.GLContext(8, 8).make_current()' \
        >/dev/null 2>&1
}

install_egl() {
    if draws_through_egl; then return; fi
    apt_install libegl1 libegl-mesa0 libgl1-mesa-dri && draws_through_egl ||
        could_not "EGL, for pictures of MuJoCo: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri; states work without"
}

# --- the stamp: what is installed, and from which inputs ----------------------------------------------------------

inputs_hash() {
    {
        printf '%s\n' "$ROOT" "$(device)" "$("$VENV/bin/python" -V 2>&1)"
        cat "$ROOT"/requirements/{install.sh,software_vulkan.sh,constraints-cpu.txt} "$ROOT/pyproject.toml"
    } | sha256sum | cut -d' ' -f1
}

# Line $1 of the stamp and what follows: the hash of the inputs, then the installed groups.
stamp_from() { if [ -f "$STAMP" ]; then tail -n "+$1" "$STAMP"; fi; }

write_stamp() {
    printf '%s\n' "$@" >"$STAMP.part"
    mv "$STAMP.part" "$STAMP"
}

report() {
    local line
    if [ ${#COULD_NOT[@]} -eq 0 ]; then
        say "ready: $VENV"
        return
    fi
    say "ready: $VENV, except for:"
    for line in "${COULD_NOT[@]}"; do say "  - $line"; done
}

main() {
    parse_arguments "$@"
    choose_mirror
    trap 'printf "\n[install] interrupted; the same command goes on where it stopped\n" >&2; exit 130' INT TERM
    make_venv
    STAMP=$VENV/rlinf-install.stamp
    LOG=$VENV/rlinf-install.log

    local hash have wanted
    hash=$(inputs_hash)
    have=$(stamp_from 2)
    # Groups once installed stay: asking for one simulator does not forget the other.
    wanted=$(printf '%s\n' ${EXTRAS[@]+"${EXTRAS[@]}"} "$have" | sed '/^$/d' | sort -u)
    if [ "$(stamp_from 1)" != "$(printf '%s\n' "$hash" "$wanted")" ]; then
        : >"$LOG"
        install_packages "$(paste -sd, <<<"$wanted")"
        check_torch
        if contains libero "$(paste -sd' ' <<<"$wanted")"; then install_libero; fi
    fi
    case "$NEEDS_VULKAN $NEEDS_EGL $NEEDS_LIBRARIES" in *yes*) install_libraries ;; esac
    if [ "$NEEDS_VULKAN" = yes ]; then install_vulkan; fi
    if [ "$NEEDS_EGL" = yes ]; then install_egl; fi
    write_stamp "$hash" "$wanted"
    report
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then main "$@"; fi
