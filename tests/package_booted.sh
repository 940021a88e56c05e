#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
#
# tests/package_booted.sh   (as root, where systemd is process 1 and all may be spoiled: make test-deb)
#
# Installs the Debian package in build/deb, has its units go through debian/tests/service, an upgrade included, and
# removes it while nodes run.
set -euo pipefail

ROOT=$(cd -- "${BASH_SOURCE[0]%/*}/.." && pwd)
PACKAGE=nbdkit-plugin-replication
UNIT=nbdkit-replication@kept
export DEBIAN_FRONTEND=noninteractive

fail() {
    printf 'package: %s\n' "$1" >&2
    exit 1
}

log=$(mktemp)

# Quiet unless it fails.
quiet() {
    "$@" >"$log" 2>&1 </dev/null || {
        cat "$log" >&2
        fail "$* has failed"
    }
}

[[ -e /run/systemd/system ]] || fail "systemd does not run here (scripts/debian --boot)"
mapfile -t made < <(find "$ROOT/build/deb" -name "${PACKAGE}_*.deb")
((${#made[@]} == 1)) || fail "there is not one package in build/deb (make deb): ${made[*]:-none}"
package=${made[0]}
version=$(dpkg-deb -f "$package" Version)

printf '== install %s (%d s)\n' "$version" "$SECONDS"
quiet apt-get -qq install -y --no-install-recommends "$package"
[[ -z $(systemctl list-units --plain --no-legend 'nbdkit-replication*' 'replication-monitor*') ]] ||
    fail "a unit was started: $(systemctl list-units --plain --no-legend 'nbdkit-replication*' 'replication-monitor*')"
next=$(mktemp -d)
dpkg-deb -R "$package" "$next/tree"
sed -i "s/^Version: .*/Version: $version+next/" "$next/tree/DEBIAN/control"
quiet dpkg-deb -b "$next/tree" "$next/next.deb"
"$ROOT/debian/tests/service" --upgrade "$next/next.deb"

printf '== the demonstration of it (%d s)\n' "$SECONDS"
quiet "$ROOT/scripts/setup" demo
quiet "$ROOT/scripts/demo-installed"
grep -q '^-- All that the guest had written' "$log" || fail "it was not shown: $(tail -n 1 "$log")"
[[ -z $(find /etc/nbdkit-replication.d -name 'demo-*') ]] || fail "the demonstration has left something"

printf '== remove with a running node, and purge (%d s)\n' "$SECONDS"
truncate -s 16M /srv/kept.img
chown nbdkit-replication: /srv/kept.img
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
quiet replctl init kept --mode secondary --disk /srv/kept.img --listen "127.0.0.1:$port"
quiet systemctl enable --now "$UNIT"
quiet replctl kept status
quiet apt-get -qq remove -y "$PACKAGE"
for unit in "$UNIT.service" "$UNIT.socket"; do
    ! systemctl is-active --quiet "$unit" || fail "$unit runs although its program is gone"
done
[[ -s /var/lib/nbdkit-replication/kept/state.json ]] || fail "the state of a node has gone"
quiet dpkg --purge "$PACKAGE"
[[ -z $(find /etc/systemd/system -name '*nbdkit-replication*') ]] || fail "a unit is still enabled"
[[ ! -e /run/nbdkit-replication ]] || fail "sockets and locks of nodes are left: $(find /run/nbdkit-replication)"

# From the sources, as on a machine where nobody has installed anything. (build/ cannot be written to here.)
printf '== the demonstration without a package (%d s)\n' "$SECONDS"
rm -r /etc/nbdkit-replication.d /var/lib/nbdkit-replication
quiet userdel nbdkit-replication
quiet apt-get -qq install -y --no-install-recommends make
sources=$(mktemp -d)
chmod 755 "$sources"
tar -C "$ROOT" --exclude=./build --exclude=./.venv -cf - . | tar -C "$sources" -xf -
quiet "$sources/scripts/demo-installed"
grep -q '^-- All that the guest had written' "$log" || fail "it was not shown: $(tail -n 1 "$log")"
left=$(find /etc /run/nbdkit-replication /srv /usr/local /usr/lib /var/lib -path '*nbdkit-replication*' 2>/dev/null || true)
[[ -z $left ]] || fail "the demonstration has left $left"
! getent passwd nbdkit-replication || fail "the demonstration has left its user"
printf 'package: the units of %s are fine (%d s)\n' "${package##*/}" "$SECONDS"
