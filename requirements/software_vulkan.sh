#!/usr/bin/env bash
# Makes DIR/lvp.json name a software Vulkan driver (Mesa's lavapipe) that is new enough for SAPIEN.
#
#   bash requirements/software_vulkan.sh DIR
#
# Debian 12's own lavapipe lacks descriptor indexing, so there the driver alone is taken out of the backports
# package and unpacked into DIR; nothing on the system is changed. Elsewhere the distribution's driver serves, and
# DIR/lvp.json only points to it. Either way a program renders without a GPU after
#   export VK_ICD_FILENAMES=DIR/lvp.json
#
# Exit status: 0 done; 1 not possible, with the reason and the remedy on stderr.

set -euo pipefail

readonly DRIVER=libvulkan_lvp.so
readonly PACKAGE=mesa-vulkan-drivers

fail() {
    printf 'software Vulkan: %s\n' "$*" >&2
    exit 1
}

# The release of this machine as apt's sources spell it ("bookworm", "noble").
codename() {
    # shellcheck disable=SC1091  # the file belongs to the system
    (. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif sudo -n true 2>/dev/null; then
        sudo -n "$@"
    else
        return 1
    fi
}

apt_install() {
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get -qq -o Dpkg::Use-Pty=0 install -y --no-install-recommends "$@" >/dev/null
}

# Rewrites the package sources of the apt directory $1 that serve release $2 to serve suite $3, into $4.sources and
# $4.list. The mirror, the signing key and all options stay what the administrator chose.
derived_sources() {
    local apt=$1 release=$2 suite=$3 output=$4 file
    for file in "$apt"/sources.list.d/*.sources; do
        [ -f "$file" ] || continue
        # One stanza per record; a stanza counts when it is enabled, carries binaries and names the release itself.
        awk -v release="$release" -v suite="$suite" '
            BEGIN { RS = ""; FS = "\n" }
            {
                found = 0; binary = 0; enabled = 1; stanza = ""; skip = 0
                for (i = 1; i <= NF; i++) {
                    if ($i ~ /^#/) continue
                    if ($i !~ /^[ \t]/) skip = 0
                    key = tolower($i); sub(/:.*/, "", key)
                    value = $i; sub(/^[^:]*:/, "", value)
                    if (skip) { found = found || has(value, release); continue }
                    if (key == "types") binary = has(value, "deb")
                    if (key == "enabled" && tolower(value) ~ /no|false/) enabled = 0
                    if (key == "suites") {
                        found = has(value, release)
                        skip = 1  # and its continuation lines
                        stanza = stanza "Suites: " suite "\n"
                        continue
                    }
                    stanza = stanza $i "\n"
                }
                if (found && binary && enabled) print stanza
            }
            function has(list, word,    n, words, j) {
                n = split(list, words, /[ \t]+/)
                for (j = 1; j <= n; j++) if (words[j] == word) return 1
                return 0
            }' "$file" >>"$output.sources"
    done
    for file in "$apt"/sources.list "$apt"/sources.list.d/*.list; do
        [ -f "$file" ] || continue
        awk -v release="$release" -v suite="$suite" '
            $1 == "deb" {
                at = 2
                if ($2 ~ /^\[/) while (at <= NF && $at !~ /\]$/) at++
                if ($2 ~ /^\[/) at++
                if ($(at + 1) == release) { $(at + 1) = suite; print }
            }' "$file" >>"$output.list"
    done
}

# apt-get with its own sources and state under $1, so that nothing of the system's apt is touched.
private_apt() {
    local state=$1
    shift
    apt-get -qq -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$state/sources" \
        -o Dir::State::Lists="$state/lists" -o Dir::Cache="$state/cache" -o APT::Sandbox::User= "$@"
}

# Libraries that the driver $1 needs and the loader does not find.
missing_libraries() {
    ldd "$1" 2>/dev/null | awk '/not found/ { print $1 }' | sort -u
}

# Installs the packages that $1 (a .deb) depends on, at the distribution's own versions. The Mesa of backports asks
# for newer ones, but only its hardware drivers use what is new in them.
install_dependencies() {
    local name names=()
    while read -r name; do
        if apt-cache show "$name" >/dev/null 2>&1; then names+=("$name"); fi
    done < <(dpkg-deb -f "$1" Depends | tr ',' '\n' | sed 's/|.*//; s/(.*//; s/:any//; s/[[:space:]]//g')
    apt_install "${names[@]}"
}

write_manifest() {
    printf '{"file_format_version": "1.0.0", "ICD": {"library_path": "%s", "api_version": "1.3.0"}}\n' "$1" \
        >"$2/lvp.json.part"
    mv "$2/lvp.json.part" "$2/lvp.json"  # a rename: an interrupted run leaves no half-written manifest
}

from_backports() {
    local target=$1 suite=$2 work driver missing
    work=$(mktemp -d "$target/unpack.XXXXXX")
    # shellcheck disable=SC2064  # the path of now is meant
    trap "rm -rf '$work'" EXIT
    mkdir -p "$work"/sources "$work"/lists/partial "$work"/cache/archives/partial "$work"/root
    derived_sources /etc/apt "${suite%-backports}" "$suite" "$work/sources/backports"
    if [ ! -s "$work/sources/backports.sources" ] && [ ! -s "$work/sources/backports.list" ]; then
        fail "no package source of ${suite%-backports} under /etc/apt from which that of $suite could be derived"
    fi
    private_apt "$work" update || fail "the suite $suite could not be read from this machine's package mirror"
    (cd "$work" && private_apt "$work" download "$PACKAGE/$suite") ||
        fail "the package $PACKAGE of $suite could not be downloaded"
    dpkg-deb -x "$work/$PACKAGE"_*.deb "$work/root"
    driver=$(find "$work/root" -name "$DRIVER" -print -quit)
    [ -n "$driver" ] || fail "the package $PACKAGE of $suite holds no $DRIVER"
    if [ -n "$(missing_libraries "$driver")" ]; then
        as_root apt-get -qq update || true  # what is still missing afterwards is named below
        install_dependencies "$work/$PACKAGE"_*.deb || true
    fi
    missing=$(missing_libraries "$driver" | tr '\n' ' ')
    [ -z "$missing" ] || fail "libraries are missing: ${missing}- an administrator installs them with: apt-get install \
$(dpkg-deb -f "$work/$PACKAGE"_*.deb Depends | tr ',' '\n' | sed 's/|.*//; s/(.*//; s/[[:space:]]//g' | tr '\n' ' ')"
    install -m 644 "$driver" "$target/$DRIVER"
    install -m 644 "$work/root/usr/share/doc/$PACKAGE/copyright" "$target/COPYRIGHT"
    write_manifest "$target/$DRIVER" "$target"
}

# Path of the system's own lavapipe, or nothing.
system_driver() {
    find /usr/lib /usr/lib64 /usr/local/lib -name "$DRIVER" -print -quit 2>/dev/null || true
}

from_distribution() {
    local target=$1 driver
    driver=$(system_driver)
    if [ -z "$driver" ]; then
        command -v apt-get >/dev/null ||
            fail "this is no Debian or Ubuntu; install Mesa's Vulkan drivers with the system's own package manager"
        as_root true || fail "not allowed to install packages; an administrator runs: apt-get install $PACKAGE"
        as_root apt-get -qq update || true  # an unreachable side source must not hide a reachable main one
        apt_install "$PACKAGE" || fail "apt-get install $PACKAGE did not succeed"
        driver=$(system_driver)
    fi
    [ -n "$driver" ] || fail "the package $PACKAGE of this system holds no $DRIVER"
    write_manifest "$driver" "$target"
}

main() {
    [ $# = 1 ] || fail "usage: bash requirements/software_vulkan.sh DIR"
    mkdir -p "$1"
    local target release
    target=$(cd "$1" && pwd)
    release=$(codename)
    case $release in
        bookworm) from_backports "$target" bookworm-backports ;;
        *) from_distribution "$target" ;;
    esac
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then main "$@"; fi
