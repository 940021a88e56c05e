#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
#
# init.sh NAME FOLDER [cluster]: the first process of a host, in namespaces of its own. FOLDER has what the host keeps
# without power. With the third argument nothing of the cluster is started. The end of this process is the end of all
# others.
set -eu

name=$1
folder=$2

hostname "$name"
mkdir -p "$folder"/{pacemaker,corosync,srv,log,nodes,etc}
mkdir -p /etc/corosync /etc/nbdkit-replication.d /var/lib/nbdkit-replication
mount -t tmpfs tmpfs /dev/shm
# A start is a boot: for the plugin a loss of power differs from the end of a process.
cat /proc/sys/kernel/random/uuid >"$folder/boot_id"
mount -t proc proc /proc
mount --bind "$folder/boot_id" /proc/sys/kernel/random/boot_id
mount --bind "$folder/pacemaker" /var/lib/pacemaker
mount --bind "$folder/corosync" /var/lib/corosync
mount --bind "$folder/nodes" /var/lib/nbdkit-replication
mount --bind "$folder/srv" /srv
mount --bind "$folder/log" /var/log
mount --bind "$folder/etc" /etc/corosync
mount --bind "$folder/etc" /etc/nbdkit-replication.d
if [[ -d $folder/libvirt ]]; then
    mkdir -p "$folder"/libvirt/{etc,lib,cache} /var/log/libvirt/qemu
    mount --bind "$folder/libvirt/etc" /etc/libvirt
    mount --bind "$folder/libvirt/lib" /var/lib/libvirt
    mount --bind "$folder/libvirt/cache" /var/cache/libvirt
fi
mkdir -p /var/lib/pacemaker/{cib,pengine,blackbox,cores} /var/log/{pacemaker,corosync,crmsh,pcsd}
chown -R hacluster:haclient /var/lib/pacemaker /var/log/pacemaker
chmod 750 /var/lib/pacemaker/*
mount -t tmpfs tmpfs /run
mkdir -p /run/{crm,lock,resource-agents,corosync,nbdkit-replication}
chown hacluster:haclient /run/crm

export PCMK_logfile=/var/log/pacemaker/pacemaker.log PCMK_logpriority=info PCMK_ipc_type=shared-mem
ulimit -l unlimited 2>/dev/null || true
if [[ -d $folder/libvirt ]]; then
    libvirtd >/var/log/libvirt/stderr 2>&1 &
    for ((i = 0; i < 600; i++)); do
        if virsh -q -c qemu:///system uri >/dev/null 2>&1; then break; fi
        sleep 0.1
    done
fi
if [[ ${3:-} == cluster ]]; then
    touch /run/host-up
    while :; do wait -n 2>/dev/null || sleep 0.2; done
fi
corosync -f >/var/log/corosync/stderr 2>&1 &
for ((i = 0; i < 300; i++)); do
    if corosync-cfgtool -s >/dev/null 2>&1; then break; fi
    sleep 0.1
done
pacemakerd -f >/var/log/pacemaker/stderr 2>&1 &
touch /run/host-up
while :; do wait -n 2>/dev/null || sleep 0.2; done
