#!/bin/sh
# SPDX-License-Identifier: BSD-3-Clause
#
# PID 1 of the test guest, under busybox. It appends numbered records to a file on /dev/vda (ext4), makes each durable,
# and only then says so on the console. records.py knows what a record looks like, guest.py reads what is said:
#
#   vm: alive                    the kernel runs this script
#   vm: disk                     the first block of /dev/vda has been read
#   vm: mounted LAST             all file systems are mounted (their journals replayed); LAST is the last record there is
#   vm: replayed N               two disks: record N was on the journal disk only, and has been brought to the data disk
#   vm: record N COUNT UPTIME    record N is durable; the COUNTth of this guest's memory, UPTIME seconds after its boot
#   vm: stopped N                after `stop` on the console: N was the last, everything is unmounted; the power goes off
#   vm: error TEXT               something failed; nothing more is written
#
# With vm.agent=1 the guest agent of QEMU runs, at the second serial port.
#
# Kernel parameters: vm.tag=NUMBER stands in every record, so that one sees which guest has written it. With vm.disks=2
# a record goes to the journal disk /dev/vdb first, and is durable there before it goes to the data disk /dev/vda.

/bin/busybox mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev

say() { echo "vm: $*"; }

fail() {
    say "error $*"
    while :; do sleep 60; done
}

say alive
read -r cmdline </proc/cmdline
tag=0 disks=1 agent=
for word in $cmdline; do
    case $word in
        vm.tag=*) tag=${word#*=} ;;
        vm.disks=*) disks=${word#*=} ;;
        vm.agent=*) agent=${word#*=} ;;
    esac
done

for module in virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk; do
    # Others are built in.
    if [ -e "/modules/$module.ko" ]; then insmod "/modules/$module.ko" || fail "insmod $module"; fi
done
dd if=/dev/vda of=/dev/null bs=4096 count=1 2>/dev/null || fail "read /dev/vda"
say disk

mount -t ext4 /dev/vda /data || fail "mount /dev/vda"
files=/data/records
if [ "$disks" = 2 ]; then
    mount -t ext4 /dev/vdb /journal || fail "mount /dev/vdb"
    files="/journal/records /data/records"
fi
for file in $files; do
    [ -e "$file" ] || true >"$file" || fail "create $file"
    sync "${file%/*}" "$file" || fail "sync $file"
done

# Puts the last record's number and checksum into n and sum.
last() {
    n=0 sum=0
    if [ -s "$1" ]; then
        tail -c 512 "$1" >/run/last
        read -r n sum _ </run/last
    fi
}

# Appends record n to a file and makes it durable.
append() {
    { printf '%8d %10d %4d %s\n' "$n" "$sum" "$tag" "$filler" >>"$1" && sync "$1"; } || fail "record $n to $1"
}

last /data/records
say "mounted $n"
if [ "$disks" = 2 ]; then
    data=$n
    last /journal/records
    if [ "$n" = $((data + 1)) ]; then
        { cat /run/last >>/data/records && sync /data/records; } || fail "replay of record $n"
        say "replayed $n"
    elif [ "$n" != "$data" ]; then
        fail "the journal ends with record $n, the data with record $data"
    fi
fi

stopping=
trap 'stopping=1' TERM
stty -echo </dev/ttyS0
while read -r word; do
    if [ "$word" = stop ]; then kill -TERM 1; fi
done </dev/ttyS0 &

if [ "$agent" ]; then
    stty raw -echo </dev/ttyS1
    qemu-ga -m isa-serial -p /dev/ttyS1 -t /run -f /run/qemu-ga.pid </dev/null >/run/qemu-ga.log 2>&1 &
fi

count=0
until [ "$stopping" ]; do
    n=$((n + 1)) count=$((count + 1))
    sum=$((((sum * 1103515245 + n * 31 + tag) & 0xffffffff) + 0x100000000)) # ten digits, always
    filler=$sum$sum$sum$sum$sum$sum$sum$sum
    filler=$filler$filler$filler$filler$filler$filler${sum%????}
    for file in $files; do append "$file"; done
    read -r uptime _ </proc/uptime
    say "record $n $count $uptime"
done

for file in $files; do umount "${file%/*}" || fail "umount ${file%/*}"; done
say "stopped $n"
poweroff -f
