# SPDX-License-Identifier: BSD-3-Clause
"""Continuous disk replication behind NBD: the library that plugin.py puts into nbdkit.

Where to start reading
----------------------
A guest write on the primary, from top to bottom, with no step back up:

    plugin.pwrite -> server.export.Export.write -> primary.disk.PrimaryDisk.write
        record.changes.ChangeMap.begin  what the secondary may lack, before the disk changes
        disk.face.Disk.write            the local disk (file.FileDisk or endpoint.NbdDisk)
        primary.forward.Forwarder.put   the queue to the secondary, drained by one thread, which sends small writes
                                        together (batch.py)

and what becomes of it on the secondary:

    plugin.pwrite -> server.export.DataExport.write -> secondary.disk.SecondaryDisk.target_write (or _write_batch)
        image.target.TargetWrites.write copy-before-write into hidden, then the secondary disk

The secondary's own guest:

    plugin.pread  -> server.export.Export.read  -> secondary.disk.SecondaryDisk.guest_read  -> Stack.read
    plugin.pwrite -> server.export.Export.write -> secondary.disk.SecondaryDisk.guest_write -> Stack.write_top

Commands come from the other side: control.server -> control.commands -> node.Node, which owns the stage, the disks, the
gate and the state folder, and does start, checkpoint and stop for all disks at one instant.

node.side is a primary.side.PrimarySide or a secondary.side.SecondarySide. A promoted secondary that becomes a primary
keeps its disks and its process: the node swaps the side and what is behind the exports (Node.faces), with the gate
closed.

The pair
--------
    primary.dial.Dialler --(.control, replication-pair)--> control.inband -> control.paircommands -> secondary.pairing
    primary.link.Link       keeps the link up: connects, notices a loss, connects again
    primary.resync.Resync   sends what the secondary lacks
    primary.epochs.Epochs   cuts the stream of writes, and has the secondary take its checkpoint there
    primary.verify.Verify   compares the two disks, each range at one place of the stream
    record.lineage.decide   nothing to send, what the change maps say, everything, or a refusal; the same on both sides

The guest of a secondary whose requests follow the owner (follow-owner=true):

    server.export.FollowingExport -> Elsewhere, of the guest face -> passing.Passing.run -> passing.Passer
    -> .owner:TOKEN:NAME of the primary -> server.export.PassedExport -> as a write of its own guest

What outlives what
------------------
    the process     everything that was answered: data is in the page cache, words and maps are stores into mapped files
    the host        the stage (state.json), and what a guest has flushed. With durability=power also the checkpoint: see
                    image/stack.py, image/table.py and record/state.py. secondary/images.py finds out what a restart
                    has left.

Source and compiled
-------------------
    The modules that every request passes through (the list is in scripts/compile) also run compiled by mypyc, with
    the same meaning; compiled.py sees to it that the sources run where they do not fit. They do without what mypyc
    lacks: ctypes, weak references, `del` of an attribute, `break` out of a `with`, a class that others subclass in a
    module that is not compiled, an attribute whose name makes a word of C (`_thread`).

What every request passes is written for the interpreter as well. There a member of an enumeration has a name in its
module (Python 3.11 takes 80 ns more to look `Kind.WRITE` up than a global), a lock is taken and given back by name (the
`with` of it costs 100 ns more), and nothing is called that only passes a call on.

Layers (a file imports only from lines below its own; tests/unit/test_layers.py holds that)
------------------------------------------------------------------------------------------
    plugin.py                   nbdkit callbacks; one error boundary; the only file that imports nbdkit
    demo/                       the demonstration, which is not installed
        story.py                the steps in their order
        writing.py guest.py     who writes: through the primary's export, and on the guest face
        node.py                 nbdkit, asked by replctl
        filesystem.py           a real file system, made, read back and compared
        processes.py teller.py  what is started; what a person reads
    cluster/                    a node as a resource of Pacemaker
        agent.py                the actions
        telling.py              what the cluster learns
        asking.py               what is asked of the node
        decision.py             what follows from what a node and the cluster say
        pacemaker.py            the score and the register, by the cluster's tools
        process.py              starts and ends the node
        mark.py                 that the node is promoted
        serials.py              which promotions this host knows of
        codes.py                how an action ends
        told.py                 what the cluster says to the agent
        metadata.py             what the agent says of itself
    machine/                    protects a virtual machine together with its disk: what ft-agent calls
        protection.py           an epoch every interval
        agent.py                one epoch, on host A
        takeover.py             host B goes on
        receiver.py             host B takes states
        remote.py               host A's connection to the receiver
        store.py                the states on host B, and which of them belongs to the disk
        monitor.py              QMP with the errors and limits of this wing
        pauses.py               how long the guest stood still
    monitor/                    watches all nodes of a host: what replication-monitor is
        service.py              a fleet and a web server, from beginning to end
        web.py                  who reads what over HTTP
        metrics.py              what Prometheus reads
        page.py                 what people read
        fleet.py                which nodes are watched
        watcher.py              the conversation with one node
        journal.py              its events, its last hour, counters
        handlers.py             whose commands run when something has happened
        sight.py                what was learned of it
        access.py               where to listen, and who may read
    replctl/                    the command line of replctl, and the nodes of this host
        line.py                 from what was typed to an exit code
        completion.py           what bash offers for a word
        table.py                one row for each command
        listing.py              all nodes in one table
        doctor.py               looks at what is often wrong
        hostchecks.py           of this host: files, disks, folders, ports, certificates
        peerchecks.py           of the other side
        finding.py              what a check has found, and what it looks at
        initial.py              the file of a new node; checking files
        rehearsal.py            a test of a failover
        trial.py                whether something works on it
        guest.py                libvirt's XML and QEMU's arguments for a node
        comparison.py           which of two nodes is newer
        veto.py                 a hook of libvirt that asks may-run
        nodes.py                the nodes of this host, by name
        outcome.py              exit codes, and the JSON of a failure
    service/                    a node as a service of its host
        reload.py               takes over what has changed in the file
        launch.py               folders, sockets, nbdkit's command line; becomes nbdkit
        sockets.py              those of systemd, and those that are missing
        pulse.py                tells systemd that the node answers, and how it is
        notify.py               datagrams to systemd
        config.py               what a NAME stands for: its file
        guard.py                asks those that may refuse a resync
        handlers.py             the handlers in it
    client/                     the other end of a control socket: what replctl calls, nothing of the plugin
        roles.py                replctl's commands by which a manager decides
        verify.py               the comparison of the disks, begun and awaited
        resize.py               disks that were grown
        quiesce.py              a checkpoint for which the guest's agent freezes its file systems
        commands.py             replctl's commands
        check.py                a node as Nagios sees it
        history.py              what replication-monitor knows of all nodes
        live.py                 the move of a disk whose guest goes on
        switchover.py           the planned move of a disk
        progress.py             jobs as bars
        trace.py                how long requests take, and why
        status.py               query-replication as lines and a table
        values.py               one value of an answer, as a person reads it
        session.py              the conversation with one node
        qmp.py                  the QMP client
        lines.py                JSON objects, one a line, with deadlines
    server/                     what nbdkit asks of us, and what we do about nbdkit and Python
        threads.py              nbdkit's threads, as Python sees them
        errorlines.py           the lines that nbdkit prints for failed requests
        later.py                the user that nbdkit becomes
        hangup.py               a client that dies must not end the process (Debian 12 only)
        disconnect.py           ending the process although clients are connected
        asleep.py               whether nbdkit's threads sleep
        placement.py            on which core the threads run
        export.py               export name -> Face
        presence.py             whether a client is there still
        clients.py              who is at the other end of an NBD connection
        abilities.py            what the nbdkit that runs us can do
    control/                    QMP, on a Unix socket and in-band
        paircommands.py         the QMP commands of a primary, over the control export
        inband.py               QMP over NBD: the export .control of a secondary
        server.py               the Unix socket and its clients
        commands.py             the QMP command table over a Node
        qmp.py                  the protocol: parsing, greeting, errors
    node.py                     stage, start/checkpoint/get_error/stop; what outlives the process
    promotion.py                from any state to a role
    role.py                     who owns the disks, as far as a node knows, and how good an owner it would be
    primary/                    the primary's half of the pair
        schedule.py             automatic checkpoints, and the warning when the last one gets old
        side.py                 all disks of a process as a primary, also one that was a secondary
        growth.py               disks that grow, the secondary's first
        watch.py                what the secondary says of itself while the link is up
        epochs.py               the primary's checkpoints: cut, brought over, taken
        verify.py               the job that compares the disks of both nodes
        link.py                 the link's states, its loss, and its coming back
        cause.py                why there is no link, as a code
        dial.py                 how a primary comes to an agreement with its secondary
        resync.py               the job that sends what the secondary lacks
        proof.py                what of that the secondary has nevertheless
        compare.py              the comparison of one disk, while the guest writes
        pace.py                 how fast what is not the guest's may be sent, or read
        disk.py                 local I/O and forwarding
        content.py              what a range of the primary's disk holds, as entries
        forward.py              the forward queue of a disk and its connection
        backlog.py              what waits for the secondary, and how much of it there may be
        peer.py                 the primary's client of .control
    secondary/                  the secondary's half of the pair
        side.py                 all disks of a process as a secondary
        growth.py               disks that grow while they are in use
        images.py               opening the overlays, and what a restart of the host has left of them
        backup.py               copy-before-write as a job, and what its failure means
        fill.py                 warns when the overlays' file system fills up
        pairing.py              which primary may write to a secondary, and whether its disks are complete
        hindrance.py            why no checkpoint is taken, and when that is over
        failover.py             the commit of all disks, and what it would cost
        commit.py               the job that commits the overlays down after failover
        rehearsals.py           tests of a failover
        disk.py                 the guest face and the target face
        reclaim.py              giving back stale overlay space
    sizes.py                    which size of a disk that was grown counts
    side.py                     what the two modes have in common for the node
    passing.py                  a guest's requests, passed on to the owner of the disks
    acquaintance.py             how a secondary and its owner show each other who they are
    digests.py                  digests of a secondary's disk, read like data
    admission.py                when the guest is served, and when it stands still
    lease.py                    how long the primary of a secondary may serve its guest still
    conditions.py               under which conditions a failover is wanted, and what it loses
    batch.py                    many small writes in one NBD request
    image/                      overlays, as stock qemu-img reads them
        stack.py                active, hidden and secondary disk as one, as the guest sees them
        descent.py              how what the overlays hold comes down into the secondary disk
        target.py               the primary's writes, and copy-before-write
        room.py                 space in the overlays' file systems
        frozen.py               the content of one instant, and what a test writes over it
        shortage.py             room for writes that meet a full file system, found once for all
        overlay.py              bits and data of one overlay
        layer.py                the images of a stack by name
        plan.py                 many writes put in order
        buffers.py              memory for copying, used again
        syncgroup.py            many requests share one sync
        table.py                the allocation words in use: the image's own, or a live copy
        qcow2.py                the qcow2 layout: creating, validating, mapping
    record/                     what is known of whose content, and outlives the process
        ledger.py               what becomes true with a checkpoint
        growing.py              maps and sizes of disks that grow
        ancestry.py             this node's lineage, and how it outlives the process
        state.py                the state folder
        verified.py             what the last comparison of the disks has found
        guests.py               whose disk is another one than they have used
        tested.py               what the last test of a failover has found
        resultfile.py           a small file with such a result
        keeper.py               who writes the record: one write at a time, and in time or not at all
        twin.py                 a document that is overwritten in place, crash-safe
        binding.py              what binds the files of a state folder together
        changes.py              the change map
        grainfile.py            a file of one byte a grain, with a seal
        outdated.py             that another node went on
        lineage.py              who has what: generations, and what two nodes that meet may do
        boot.py                 the boot of the host
    disk/                       a disk in a file or behind NBD
        open.py                 opening a disk by path or URI
        file.py endpoint.py     a disk in a file, behind NBD
        requests.py             what an NBD server is asked
        face.py                 what every disk can do
        unflushed.py            what of a disk a flush has not covered yet
        connection.py           one libnbd handle with deadlines
        fence.py                what a connection that was given up may still do
        direct.py               libnbd calls that keep the GIL
        lock.py                 QEMU's byte-range locks
        mapped.py               a part of a file in memory, whose changes need no block
        files.py                the system calls that change files, as a seam
    options.py                  the command line and the TOML file
    tls.py                      certificates and keys of our own connections, and why a handshake fails
    addresses.py                several addresses of one name, side by side
    silence.py                  how long the other host owes an acknowledgement
    uri.py                      NBD URIs as libnbd reads them
    jobs.py fault.py            what query-jobs and get-error report
    order/                      who waits for whom
        standstill.py           the guest waits, or gets errors, because another one may run elsewhere
        gate.py rangelock.py    the gate before all requests; ranges, first come first served
        latency.py              how long requests take, and what they wait for
        urgency.py              who gives way to a failover
        worker.py               a thread that works in rounds, and comes back
        ended.py                how who waits for an answer learns of it
        pause.py                where a test can hold a thread
    compiled.py                 which modules run: compiled ones, or their sources
    events.py stage.py errors.py
    reason.py                   why a node does not do something, as a code
    log.py                      lines for nbdkit's log

A name with a slash is a wing: its `__init__.py` says what it is for, what always holds in it, and which file to read
first.

Who waits for whom: the lock order
----------------------------------
A thread takes these only downwards, and holds none of the locks marked (m) across I/O:

    0. Promotion._changing  a change of role, which is several commands; then Promotion._attempt, an attempt to reach
                       the peer, whose holder only tries to get the former
    1. Node._command   one control command that changes the stage at a time
    2. Gate            every guest and target request is inside the gate; checkpoint, start and stop close it,
                       wait until it is empty, and work alone. A request takes it once.
    3. RangeLock       whole 4 KiB blocks, first come first served. The stack has two: `top` (guest writes,
                       commit) and `below` (target writes). No thread takes both. The primary has one a
                       disk (guest writes). Held across the I/O of the request that it orders. Below either of the
                       two, Frozen._own of a test, for what it keeps and what it writes.
                       Before it the commit, and nobody else, takes Descent._many. Stack._flushing is held across a
                       flush, without a range.
    4. Ancestry._lock, then Keeper._writing (only when a fault is latched, the stage changes, or the nodes part)
    5. PrimaryDisk._order (m)
    6. Link._lock (m), Pairing._lock (m), Epochs._lock (m)
    7. Forwarder._lock (m; of several disks in their order, by forward.cut alone), Peer._lock (m), Resync._changed (m)
    8. Budget._lock (m), Overlay._words (m), ChangeMap._lock (m), FaultLatch._lock (m), Connection._lock (m),
       Buffers._lock (m), JobList._lock (m), Account._lock (m), the two of a Commit (m), and Rehearsals._lock (m),
       above Frozen._state (m) and Allowance._lock (m)
    9. Admission._lock (m), and below it Standstill._changed (m); Tenure._lock (m); Guests._lock (m);
       Passing._changed (m), Passer._changed (m) and Passage._changed (m), each with nothing below it
    10. EventHub._lock (m), and below it ControlExport._changed (m)

Reads take no range lock. What decides for each pair that can meet on one block stands in
image/stack.py (secondary) and primary/disk.py (primary).
"""

VERSION = "0.3.0"
