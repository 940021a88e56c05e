# SPDX-License-Identifier: BSD-3-Clause
"""Continuous disk replication behind NBD: the library that plugin.py puts into nbdkit.

Where to start reading
----------------------
A guest write on the primary, from top to bottom, with no step back up:

    plugin.pwrite -> export.Export.write -> primary_disk.PrimaryDisk.write
        changes.ChangeMap.begin         what the secondary may lack, before the disk changes
        image.disk.Disk.write           the local disk (file.FileDisk or endpoint.NbdDisk)
        forward.Forwarder.put           the queue to the secondary, drained by one thread, which sends small writes
                                        together (batch.py)

and what becomes of it on the secondary:

    plugin.pwrite -> export.DataExport.write -> secondary_disk.SecondaryDisk.target_write or target_write_batch
        image.target.TargetWrites.write copy-before-write into hidden, then the secondary disk

The secondary's own guest:

    plugin.pread  -> export.Export.read  -> secondary_disk.SecondaryDisk.guest_read  -> Stack.read
    plugin.pwrite -> export.Export.write -> secondary_disk.SecondaryDisk.guest_write -> Stack.write_top

Commands come from the other side: control.server -> control.commands -> node.Node, which owns the
stage, the disks, the gate and the state folder, and does start, checkpoint and stop for all disks at
one instant.

node.side is a primary.PrimarySide or a secondary.SecondarySide. A promoted secondary that becomes a primary keeps its
disks and its process: the node swaps the side and what is behind the exports (Node.faces), with the gate closed.

The pair
--------
    dial.Dialler  --(.control, replication-pair)-->  control.inband -> control.paircommands -> pairing.Pairing
    link.Link       keeps the link up: connects, notices a loss, connects again; resync.Resync sends what is missing
    epochs.Epochs   cuts the stream of writes, and has the secondary take its checkpoint there
    lineage.decide  nothing to send, what the change maps say, everything, or a refusal; the same rule on both sides

What outlives what
------------------
    the process     everything that was answered: data is in the page cache, words and maps are stores into mapped files
    the host        the stage (state.json), and what a guest has flushed. With durability=power also the checkpoint: see
                    image/stack.py, image/table.py and state.py. images.py finds out what a restart has left.

Source and compiled
-------------------
    The modules that every request passes through (the list is in scripts/compile) also run compiled by mypyc, with
    the same meaning. They do without what it lacks: ctypes, weak references, `del` of an attribute, `break` out of a
    `with`, a class that others subclass in a module that is not compiled, an attribute whose name makes a word of C
    (`_thread`).

Layers (a file imports only from lines below its own; tests/unit/test_layers.py holds that)
------------------------------------------------------------------------------------------
    plugin.py                   nbdkit callbacks; one error boundary; the only file that imports nbdkit
    threads.py                  nbdkit's threads, as Python sees them
    hangup.py                   a client that dies must not end the process
    disconnect.py               ending the process although clients are connected
    placement.py                on which core the threads run
    export.py                   export name -> Face
    control/paircommands.py     the QMP commands of a primary, over the control export
    control/inband.py           QMP over NBD: the export .control of a secondary
    control/server.py           the Unix socket and its clients
    control/commands.py         the QMP command table over a Node
    control/qmp.py              the protocol: parsing, greeting, errors
    node.py                     stage, start/checkpoint/get_error/stop; what outlives the process
    schedule.py                 automatic checkpoints, and the warning when the last one gets old
    primary.py                  all disks of a process as a primary, also one that was a secondary
    secondary.py                all disks of a process as a secondary
    images.py                   opening the overlays, and what a restart of the host has left of them
    backup.py                   copy-before-write as a job, and what its failure means
    fill.py                     warns when the overlays' file system fills up
    pairing.py                  which primary may write to a secondary, and whether its disks are complete
    epochs.py                   the primary's checkpoints: cut, brought over, taken
    link.py                     the link's states, its loss, and its coming back
    dial.py                     how a primary comes to an agreement with its secondary
    resync.py                   the job that sends what the secondary lacks
    failover.py                 the commit of all disks, and what it would cost
    commit.py                   the job that commits the overlays down after failover
    primary_disk.py             local I/O and forwarding
    content.py                  what a range of the primary's disk holds, as entries
    secondary_disk.py           the guest face and the target face
    side.py                     what the two modes have in common for the node
    forward.py                  the forward queue of a disk and its connection
    batch.py                    many small writes in one NBD request
    backlog.py                  what waits for the secondary, and how much of it there may be
    peer.py                     the primary's client of .control
    ancestry.py                 this node's lineage, and how it outlives the process
    reclaim.py                  giving back stale overlay space
    image/stack.py              active, hidden and secondary disk as one, as the guest sees them
    image/descent.py            how what the overlays hold comes down into the secondary disk
    image/target.py             the primary's writes, and copy-before-write
    image/room.py               space in the overlays' file systems
    image/overlay.py            bits and data of one overlay
    image/layer.py              the images of a stack by name
    image/plan.py               many writes put in order
    image/buffers.py            memory for copying, used again
    image/syncgroup.py          many requests share one sync
    image/table.py              the allocation words in use: the image's own, or a live copy
    image/qcow2.py              the qcow2 layout: creating, validating, mapping
    image/disk.py               opening a disk by path or URI
    image/file.py  endpoint.py  a disk in a file, behind NBD
    image/face.py               what every disk can do
    image/connection.py         one libnbd handle with deadlines
    image/direct.py             libnbd calls that keep the GIL
    image/lock.py               QEMU's byte-range locks
    options.py                  the command line and the TOML file
    clients.py                  who is at the other end of an NBD connection
    tls.py                      certificates and keys of our own connections, and why a handshake fails
    changes.py  state.py        the change map, the state folder
    lineage.py                  who has what: generations, and what two nodes that meet may do
    image/files.py              the system calls that change files, as a seam
    jobs.py  fault.py           what query-jobs and get-error report
    gate.py  rangelock.py       who waits for whom
    ended.py                    how who waits for an answer learns of it
    events.py  log.py  pause.py  boot.py  stage.py  errors.py

Who waits for whom: the lock order
----------------------------------
A thread takes these only downwards, and holds none of the locks marked (m) across I/O:

    1. Node._command   one control command that changes the stage at a time
    2. Gate            every guest and target request is inside the gate; checkpoint, start and stop close it,
                       wait until it is empty, and work alone. A request takes it once.
    3. RangeLock       whole 4 KiB blocks, first come first served. The stack has two: `top` (guest writes,
                       commit) and `below` (target writes). No thread takes both. The primary has one a
                       disk (guest writes). Held across the I/O of the request that it orders.
                       Before it the commit, and nobody else, takes Descent._many. Stack._flushing is held across a
                       flush, without a range.
    4. Ancestry._lock, then StateFolder._saving (only when a fault is latched, the stage changes, or the nodes part)
    5. PrimaryDisk._order (m)
    6. Link._lock (m), Pairing._lock (m), Epochs._lock (m)
    7. Forwarder._lock (m; of several disks in their order, by forward.cut alone), Peer._lock (m), Resync._changed (m)
    8. Budget._lock (m), Overlay._words (m), ChangeMap._lock (m), FaultLatch._lock (m), Connection._lock (m),
       Buffers._lock (m), JobList._lock (m), and the two of a Commit (m)
    9. EventHub._lock (m), and below it ControlExport._changed (m)

Reads take no range lock. What decides for each pair that can meet on one block stands in
image/stack.py (secondary) and primary.py (primary).
"""

VERSION = "0.1.0"
