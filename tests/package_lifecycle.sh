#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
#
# tests/package_lifecycle.sh   (as root, in a root that may be spoiled: make test-deb)
#
# Takes the Debian package in build/deb through its life: installed, a pair that runs while it is upgraded, configured
# again, removed, purged, installed again. Systemd is a stand-in that notes what it is asked for.
set -euo pipefail

ROOT=$(cd -- "${BASH_SOURCE[0]%/*}/.." && pwd)
PACKAGE=nbdkit-plugin-replication
LIBRARY=/usr/lib/nbdkit-replication
CALLS=/run/systemctl-calls
CONFIGURATION=/etc/nbdkit-replication.d/kept.toml
STATE=/var/lib/nbdkit-replication/kept/state.json
export DEBIAN_FRONTEND=noninteractive

fail() {
    printf 'package: %s\n' "$1" >&2
    exit 1
}

step() {
    printf '== %s (%d s)\n' "$1" "$SECONDS"
}

# Quiet unless it fails.
quiet() {
    "$@" >/run/log 2>&1 </dev/null || {
        cat /run/log >&2
        fail "$* has failed"
    }
}

[[ -e /run/systemd/system ]] && fail "systemd runs here: this script is for a root of its own (make test-deb)"
mapfile -t made < <(find "$ROOT/build/deb" -name "${PACKAGE}_*.deb")
((${#made[@]} == 1)) || fail "there is not one package in build/deb (make deb): ${made[*]:-none}"
package=${made[0]}
version=$(dpkg-deb -f "$package" Version)

# All files with their kinds, modes and owners, but for those that dpkg, apt and others keep about packages, the
# accounts (which stay, as Debian's do) and what is mounted here.
snapshot() {
    find / -xdev '(' -path /proc -o -path /sys -o -path /dev -o -path /run -o -path /tmp -o -path /usr/src \
        -o -path /var/lib/dpkg -o -path /var/lib/apt -o -path /var/lib/systemd -o -path /var/cache -o -path /var/log \
        -o -path /root ')' -prune -o ! -name 'passwd*' ! -name 'group*' ! -name 'shadow*' ! -name 'gshadow*' \
        ! -name '.pwd.lock' ! -name 'sub[ug]id*' ! -name __pycache__ ! -path '*/__pycache__/*' \
        -printf '%p %y %m %u:%g %l\n' | sort
}

version_is() {
    [[ $(dpkg-query -W -f '${db:Status-Status} ${Version}' "$PACKAGE") == "installed $1" ]] ||
        fail "$PACKAGE is $(dpkg-query -W -f '${db:Status-Status} ${Version}' "$PACKAGE"), not installed $1"
    [[ -z $(dpkg --audit) && -z $(dpkg --verify "$PACKAGE") ]] || fail "dpkg --audit or --verify has something to say"
}

# The stand-in: it answers as if nothing were enabled and one node ran.
stand_in() {
    rm -f /usr/sbin/policy-rc.d
    mkdir -p /run/systemd/system
    printf '#!/bin/sh\necho "$*" >>%s\n' "$CALLS" >/usr/local/bin/systemctl
    chmod 755 /usr/local/bin/systemctl
    if [[ ! -e /usr/bin/systemctl ]]; then ln -s /usr/local/bin/systemctl /usr/bin/systemctl; fi
    # apt would not find it there.
    printf 'DPkg::Path "%s";\n' "$PATH" >/etc/apt/apt.conf.d/path
    : >"$CALLS"
}

called() {
    grep -qE -- "$1" "$CALLS" || fail "systemd was not asked to $1, but to: $(paste -sd ';' "$CALLS")"
}

not_called() {
    ! grep -qE -- "$1" "$CALLS" || fail "systemd was asked to $(grep -E -- "$1" "$CALLS" | paste -sd ';')"
}

step "what it depends on"
quiet apt-get -qq update
quiet apt-get -qq satisfy -y --no-install-recommends "autopkgtest, dpkg-dev" \
    "$(dpkg-deb -f "$package" Depends), $(dpkg-deb -f "$package" Recommends)"
stand_in
before=$(snapshot)

step "install $version"
quiet apt-get -qq install -y --no-install-recommends "$package"
version_is "$version"
dump=$(nbdkit replication --dump-plugin)
grep -qx "replication_version=${version%%~*}" <<<"$dump" || fail "nbdkit replication has another version: $dump"
grep -qx "replication_compiled=yes" <<<"$dump" || fail "nbdkit replication has no compiled modules: $dump"
for module in "$LIBRARY"/replication/*/*.so; do
    [[ -e ${module%%.*}.py ]] || fail "${module##*/} has no source beside it, for another Python"
done
for command in replctl ft-agent nbdkit-replication replication-monitor; do
    if [[ -e $ROOT/scripts/$command ]]; then quiet "$command" --help; fi
done
for source in "$ROOT"/man/*.pod; do
    page=$(basename "$source" .pod)
    compgen -G "/usr/share/man/man?/$page.?.gz" >/dev/null || fail "there is no manual page $page"
done
# Without a configuration nothing is started or enabled.
not_called '(^| )(start|restart|enable) '
[[ -z $(find /etc/systemd/system -name '*nbdkit-replication*') ]] || fail "a unit was enabled"

# It wants dpkg-dev. What needs a machine of its own runs in tests/package_booted.sh.
step "autopkgtest"
quiet autopkgtest -B --test-name=pair "$ROOT" -- null
grep -qE '^pair +PASS' /run/log || fail "autopkgtest has not run its test: $(cat /run/log)"

step "a node by its name, as its own user"
mkdir -p "${CONFIGURATION%/*}"
printf 'mode = "secondary"\n[disk.disk0]\ndisk = "/srv/kept.img"\ntop-id = "guest"\n' >"$CONFIGURATION"
truncate -s 16M /srv/kept.img
chown nbdkit-replication: /srv/kept.img
runuser -u nbdkit-replication -- nbdkit-replication kept >/run/log 2>&1 &
node=$!
for ((i = 0; i < 300; i++)); do
    if replctl kept status &>/dev/null; then break; fi
    kill -0 "$node" || fail "the node has ended: $(cat /run/log)"
    sleep 0.1
done
quiet replctl kept status
replctl list | grep -q kept || fail "replctl list does not know the node: $(replctl list)"
kill "$node"
wait "$node" || true
rm /srv/kept.img

step "upgrade with a running pair"
next=$(mktemp -d)
dpkg-deb -R "$package" "$next/tree"
sed -i "s/^Version: .*/Version: $version+next/" "$next/tree/DEBIAN/control"
quiet dpkg-deb -b "$next/tree" "$next/next.deb"
[[ -s $STATE ]] || fail "the node has kept no state in $STATE"
: >"$CALLS"
"$ROOT/debian/tests/pair" --during "dpkg -i '$next/next.deb' >/dev/null"
version_is "$version+next"
if [[ -e $ROOT/systemd ]]; then called "try-restart.* nbdkit-replication@"; fi
not_called '(^| )(start|restart|enable) '

step "configure twice more, and back to $version"
quiet dpkg-reconfigure "$PACKAGE"
quiet "/var/lib/dpkg/info/$PACKAGE.postinst" configure "$version+next"
quiet dpkg -i "$package"
version_is "$version"
[[ -e $CONFIGURATION && -e $STATE ]] || fail "the configuration or the state of a node has gone"

step "remove"
: >"$CALLS"
quiet apt-get -qq remove -y "$PACKAGE"
if [[ -e $ROOT/systemd ]]; then called "stop.* nbdkit-replication@"; fi
[[ ! -e $LIBRARY ]] || fail "$LIBRARY is still there: $(find "$LIBRARY" | head -n 3)"
[[ ! -e /usr/bin/replctl ]] || fail "replctl is still there"
[[ -e $CONFIGURATION && -e $STATE ]] || fail "the configuration or the state of a node has gone"

step "purge, twice"
quiet dpkg --purge "$PACKAGE"
quiet dpkg --purge "$PACKAGE"
[[ -e $CONFIGURATION && -e $STATE ]] || fail "the configuration or the state of a node has gone"
rm -r "$CONFIGURATION" "${STATE%/*}"
rmdir --ignore-fail-on-non-empty "${CONFIGURATION%/*}" "${STATE%/*/*}" 2>/dev/null || true

step "install again, and purge at once"
quiet apt-get -qq install -y --no-install-recommends "$package"
version_is "$version"
quiet dpkg --purge "$PACKAGE"
after=$(snapshot)
diff <(printf '%s\n' "$before") <(printf '%s\n' "$after") >/run/log ||
    { head -n 50 /run/log >&2; false; } || fail "the purge has left something, or taken too much"
printf 'package: %s is fine (%d s)\n' "${package##*/}" "$SECONDS"
