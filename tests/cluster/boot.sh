#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
#
# boot.sh NAME FOLDER [cluster]: as init.sh, but the host's first process is systemd, and corosync and Pacemaker are
# services. This process is its parent.
set -eu

name=$1
folder=$2

mkdir -p "$folder"/{pacemaker,corosync,srv,log,nodes,etc,layer,root}
mkdir -p /etc/corosync /etc/nbdkit-replication.d /var/lib/nbdkit-replication /run/systemd/nspawn
# Not on the disk of the root: a layer must not lie below the one under it.
mount -t tmpfs tmpfs "$folder/layer"
mkdir "$folder"/layer/{upper,work}
mount -t overlay -o "lowerdir=/,upperdir=$folder/layer/upper,workdir=$folder/layer/work" overlay "$folder/root"
mount -t tmpfs tmpfs /run/systemd/nspawn
echo "$name" >"$folder/root/etc/hostname"
: >"$folder/root/etc/machine-id"
rm -f "$folder/root/usr/sbin/policy-rc.d" "$folder"/root/etc/systemd/system/multi-user.target.wants/*
wanted=()
if [[ ${3:-} != cluster ]]; then wanted=(corosync.service pacemaker.service); fi
for unit in "${wanted[@]}"; do
    ln -s "/lib/systemd/system/$unit" "$folder/root/etc/systemd/system/multi-user.target.wants/$unit"
done
mkdir -p "$folder/root/etc/systemd/system/multi-user.target.wants" "$folder/log"/{pacemaker,corosync,crmsh,pcsd}
mkdir -p "$folder"/pacemaker/{cib,pengine,blackbox,cores}
chown -R hacluster:haclient "$folder/pacemaker" "$folder/log/pacemaker"
chmod 750 "$folder"/pacemaker/*
chown nbdkit-replication: "$folder/srv" "$folder/srv/disk.img"
mkdir -p "$folder/root/etc/tmpfiles.d"
ln -s /dev/null "$folder/root/etc/tmpfiles.d/tmp.conf" # it would empty /tmp
printf 'PCMK_logfile=/var/log/pacemaker/pacemaker.log\nPCMK_logpriority=info\n' >"$folder/root/etc/default/pacemaker"

# Of each host a control group of its own: nspawn makes others, by the same names, below the one that it is in.
for hierarchy in unified systemd .; do
    if [[ -e /sys/fs/cgroup/$hierarchy/cgroup.procs ]]; then
        mkdir -p "/sys/fs/cgroup/$hierarchy/rc-$name"
        echo $$ >"/sys/fs/cgroup/$hierarchy/rc-$name/cgroup.procs"
    fi
done
binds=()
for place in pacemaker:/var/lib/pacemaker corosync:/var/lib/corosync nodes:/var/lib/nbdkit-replication srv:/srv \
    log:/var/log etc:/etc/corosync etc:/etc/nbdkit-replication.d; do
    binds+=("--bind=$folder/${place%%:*}:${place#*:}")
done
# What is outside of the hosts: the switch and the journal.
binds+=("--bind=${folder%/*}:${folder%/*}")
UNIFIED_CGROUP_HIERARCHY=1 exec systemd-nspawn --quiet --directory="$folder/root" --boot --machine="$name" \
    --register=no --keep-unit --link-journal=no --resolv-conf=off --timezone=off --console=pipe --capability=all \
    "${binds[@]}" </dev/null
