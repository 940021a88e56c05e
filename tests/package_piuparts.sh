#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
#
# tests/package_piuparts.sh RELEASE   (on the machine with the roots under build/: make test-deb)
#
# piuparts, Debian's own test of installation, removal and purge, in a copy of the clean root of that release, which is
# in memory and goes with the run. Its log stays: build/debian/RELEASE.piuparts.
set -euo pipefail

cd -- "${BASH_SOURCE[0]%/*}/../build/debian"
HERE=../../tests/${BASH_SOURCE[0]##*/}

fail() {
    printf 'piuparts: %s\n' "$1" >&2
    exit 1
}

(($# == 1)) || fail "which release? usage: tests/package_piuparts.sh RELEASE"
[[ -d $1-clean ]] || fail "there is no clean root of $1: run make test-deb RELEASE=$1"
mapfile -t made < <(find "$1/usr/src/nbdkit-replication/build/deb" -name 'nbdkit-plugin-replication_*.deb')
((${#made[@]} == 1)) || fail "there is not one package for $1: ${made[*]:-none}"
if [[ ${PIUPARTS_INSIDE:-} != yes ]]; then
    as_root=(env)
    if [[ $(id -u) != 0 ]]; then as_root=(sudo -n env); fi
    exec "${as_root[@]}" PIUPARTS_INSIDE=yes unshare --mount --propagation private "$HERE" "$1"
fi

# In a mount namespace: what is mounted here goes with it, also when the run is interrupted.
mount -t tmpfs tmpfs /mnt
# What systemd's own scripts and tmpfiles have made by then (a dependency, which goes again), and the locks of passwd and
# of debconf.
ignore='^/(root/\.ssh|var/(cache|lib|log)/private|var/lib/systemd/(coredump|pstore))(/.*)?$'
ignore+='|^/etc/(vconsole\.conf|default/locale|\.pwd\.lock)$|^/var/cache/debconf/tmp\.ci/?$'
# The root names its own sources of packages. (No eatmydata: it would have to be in the root.)
piuparts --existing-chroot="$1-clean" --keep-sources-list --no-eatmydata --install-remove-install --tmpdir=/mnt \
    --ignore-regex="$ignore" --log-file="$1.piuparts" "${made[0]}" >/dev/null 2>&1 </dev/null || {
    grep -A 20 'ERROR' "$1.piuparts" >&2 || tail -n 20 "$1.piuparts" >&2
    fail "it has failed, see build/debian/$1.piuparts"
}
grep -q 'PASS: Installation and purging test' "$1.piuparts" || fail "it has tested nothing, see build/debian/$1.piuparts"
printf 'piuparts: %s is fine (%d s)\n' "${made[0]##*/}" "$SECONDS"
