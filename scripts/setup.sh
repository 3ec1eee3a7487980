#!/bin/sh
# Makes this checkout ready to use, and does nothing where it is: scripts/setup.sh WHAT...
#
#   run    a virtual environment in .venv with kickcall in it
#   dev    the same, with the linters and the test runner
#   docs   the same, with what builds the documentation
#   lab    the programs that boot lab guests (Debian packages)
#   rigs   the programs that only the tests on real QEMU use (Debian packages)
#   bench  what kickcall is measured against (Debian packages)
#
# PYTHON names the interpreter to build the environment with (3.11 or newer).
set -eu
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin:/sbin # debootstrap lives there, and not every user's PATH does
LOG=.cache/setup.log

# What has to be there, and the Debian package that brings it: a command, or a file by its path.
LAB='
qemu-system-x86_64    qemu-system-x86
qemu-storage-daemon   qemu-system-common
qemu-storage-daemon   qemu-utils
zstd                  zstd
'
RIGS='
debootstrap           debootstrap
qemu-system-aarch64   qemu-system-arm
socat                 socat
nc                    netcat-openbsd
/usr/bin/chromium     chromium
openssl               openssl
/usr/share/fonts/truetype/dejavu/DejaVuSansMono.ttf fonts-dejavu-core
gcc                   gcc
objcopy               binutils
/usr/include/stdio.h  libc6-dev
libvirtd              libvirt-daemon
virt-qemu-run         libvirt-daemon-driver-qemu
virsh                 libvirt-clients
pkg-config            pkg-config
/usr/include/libvirt  libvirt-dev
systemd-analyze       systemd
'
BENCH='
gdb                   gdb
/usr/bin/chromium     chromium
'

say() { echo "setup: $*"; }
fail() {
    echo "setup: $*" >&2
    exit 1
}

present() {
    case $1 in
    /*) [ -e "$1" ] ;;
    *) command -v "$1" >/dev/null 2>&1 ;;
    esac
}

can_be_root() { [ "$(id -u)" -eq 0 ] || present sudo; }

# Runs a command as root with its output kept in the log.
logged() {
    [ "$(id -u)" -eq 0 ] || set -- sudo "$@"
    "$@" >"$LOG" 2>&1 </dev/null
}

known_to_apt() {
    for package; do
        LC_ALL=C apt-cache policy "$package" 2>/dev/null | grep -q '^ *Candidate: [^(]' || return 1
    done
}

update_apt() {
    say "apt-get update"
    logged apt-get -q update
}

install_packages() {
    can_be_root || fail "root is needed, and there is no sudo. As root, run: apt-get install $*"
    known_to_apt "$@" || update_apt
    say "apt-get install $*"
    set -- env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 \
        install --no-install-recommends "$@"
    # A package list that is too old names files that the archive no longer has.
    logged "$@" || { update_apt && logged "$@"; } || {
        tail -n 20 "$LOG" >&2
        fail "apt-get could not install them; all that it said is in $LOG"
    }
}

# Installs what the table in $1 names and this system has not.
need_programs() {
    missing=$(echo "$1" | while read -r program package; do
        [ -z "$program" ] || present "$program" || echo "$package"
    done | sort -u | tr '\n' ' ')
    [ -n "$missing" ] || return 0
    if present apt-get; then
        # shellcheck disable=SC2086  # one word a package
        install_packages $missing
    else
        fail "no apt-get here, so nothing was installed. Please install what Debian has in its" \
            "packages $missing"
    fi
}

# promtool alone, without the server that its package would start: into .cache/bin.
need_promtool() {
    present promtool || [ -x .cache/bin/promtool ] && return
    present apt-get ||
        fail "no apt-get here, so nothing was installed. Please install promtool, of Prometheus"
    say "promtool, of Debian's package prometheus"
    # A package list that is too old names files that the archive no longer has.
    unpack_promtool || { can_be_root && update_apt && unpack_promtool; } || {
        tail -n 20 "$LOG" >&2
        fail "promtool could not be downloaded; all that was said is in $LOG"
    }
}

unpack_promtool() {
    folder=.cache/promtool.$$
    mkdir -p "$folder" .cache/bin
    # As root apt would download as user _apt, who may not write to this folder.
    (cd "$folder" && apt-get -q -o APT::Sandbox::User=root download prometheus &&
        dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x ./usr/bin/promtool) >"$LOG" 2>&1 &&
        mv "$folder/usr/bin/promtool" .cache/bin/promtool
    got=$?
    rm -rf "$folder"
    return "$got"
}

# libvirt's Python binding, which PyPI has no wheel of: it is built, against this system's library.
need_binding() {
    [ -x .venv/bin/python ] || need_environment run
    .venv/bin/python -c 'import libvirt' 2>/dev/null && return
    headers='from sysconfig import get_path as p; open(p("include") + "/Python.h")'
    if present apt-get && ! .venv/bin/python -c "$headers" 2>/dev/null; then
        install_packages "$(.venv/bin/python -c 'import sys
print("python%d.%d-dev" % sys.version_info[:2])')"
    fi
    say "pip install libvirt-python"
    pip_install --group rigs
}

# The lab downloads its guest once, with apt-get, which has to know the archive for that.
need_package_lists() {
    cache=${KICKCALL_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/kickcall}
    for guest in "$cache"/guest-*; do
        [ -e "$guest" ] && return
    done
    present apt-get || return 0
    known_to_apt busybox-static && return
    { can_be_root && update_apt; } || say "going on without; the lab says so if it needs them"
}

find_python() {
    for python in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    fail "Python 3.11 or newer is needed, and ${PYTHON:-python3} is" \
        "$("${PYTHON:-python3}" --version 2>&1 | tail -n 1). Debian 12 and Ubuntu 24.04 have it;" \
        "elsewhere name one: make PYTHON=/path/to/python3"
}

# Debian keeps ensurepip in a package of its own, one for each version of Python.
need_venv_module() {
    "$1" -c 'import ensurepip, venv' 2>/dev/null && return
    package=$("$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    present apt-get ||
        fail "$1 has no venv module; please install it (on Debian: $package)"
    install_packages "$package"
}

# Installs kickcall and the dependency groups named after the stamp $1, unless the stamp says that
# it is done. It holds what the environment was made from: a touch or a pull changes nothing.
need_environment() {
    stamp=.venv/.kickcall-$1
    shift
    ready "$stamp" && return
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        need_venv_module "$python"
        say "virtual environment in .venv ($("$python" --version))"
        "$python" -m venv --clear .venv
    fi
    say "pip install kickcall${1:+ and its group $1}"
    # --group came with pip 25.1, and Debian's is older.
    pip_install 'pip>=25.1'
    pip_install -e . ${1:+--group "$1"}
    made_from >"$stamp"
}

made_from() { echo "$(cksum <pyproject.toml) $PWD"; }
ready() { [ -x .venv/bin/python ] && [ "$(cat "$1" 2>/dev/null)" = "$(made_from)" ]; }
pip_install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }

[ $# -gt 0 ] || fail "say what: run, dev, docs, lab, rigs, bench"
mkdir -p .cache
# Two makes at once must not write the same environment.
if present flock; then
    exec 9>.cache/setup.lock
    flock 9
fi
programs=
promtool=
binding=
for what; do
    case $what in
    run) ready .venv/.kickcall-dev || need_environment run ;;
    dev) need_environment dev dev ;;
    docs) need_environment docs docs ;;
    lab) programs="$programs$LAB" ;;
    rigs) programs="$programs$RIGS" promtool=wanted binding=wanted ;;
    bench) programs="$programs$BENCH" ;;
    *) fail "nothing is called $what here: run, dev, docs, lab, rigs, bench" ;;
    esac
done
if [ -n "$programs" ]; then
    need_programs "$programs"
    need_package_lists
fi
[ -z "$promtool" ] || need_promtool
[ -z "$binding" ] || need_binding
