#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
#
# tests/package_booted.sh   (as root, where systemd is process 1 and all may be spoiled: make test-deb)
#
# Installs the Debian package in build/deb, and has its units go through debian/tests/service, an upgrade included.
set -euo pipefail

ROOT=$(cd -- "${BASH_SOURCE[0]%/*}/.." && pwd)
PACKAGE=nbdkit-plugin-replication
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

printf 'package: the units of %s are fine (%d s)\n' "${package##*/}" "$SECONDS"
