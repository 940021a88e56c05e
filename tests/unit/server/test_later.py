# SPDX-License-Identifier: BSD-3-Clause
"""later.py: whom nbdkit becomes, from its command line."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path

import pytest

from replication.errors import ConfigError
from replication.server.later import LaterUser

NOBODY, NOGROUP = pwd.getpwnam("nobody").pw_uid, grp.getgrnam("nogroup").gr_gid
AFTER = ["python", "plugin.py", "mode=secondary"]


@pytest.mark.parametrize(
    ("arguments", "uid", "gid"),
    [
        (["-u", "nobody", "-g", "nogroup"], NOBODY, NOGROUP),
        (["-f", "-unobody"], NOBODY, None),
        (["-vfu", "nobody"], NOBODY, None),
        (["--user", "nobody", "--group=nogroup"], NOBODY, NOGROUP),
        (["--us=nobody"], NOBODY, None),
        (["--group", "123"], None, 123),
        (["-u", "4711", "-t", "1"], 4711, None),
        (["-e", "-u", "-U", "-", "--user=1"], 1, None),
    ],
)
def test_user_and_group_are_those_of_nbdkit(arguments: list[str], uid: int | None, gid: int | None) -> None:
    for words in ([*arguments, *AFTER], [*AFTER, *arguments]):
        later = LaterUser.of(words)
        assert later is not None
        assert (later.uid, later.gid) == (uid, gid)


@pytest.mark.parametrize(
    "arguments",
    [[], ["-f"], ["-e", "-u"], ["--run", "sudo -u nobody"], ["-u", "no such user"], ["--of-a-later-version"]],
)
def test_nobody_else(arguments: list[str]) -> None:
    assert LaterUser.of([*arguments, *AFTER]) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_work_is_done_with_the_later_rights_and_root_is_back_afterwards(tmp_path: Path) -> None:
    later = LaterUser.of(["-u", "nobody", "-g", "nogroup"])
    assert later is not None
    groups = os.getgroups()
    for folder in (tmp_path, *tmp_path.parents[:2]):
        os.chmod(folder, 0o755)
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o700)
    with later.at_work():
        assert (os.geteuid(), os.getegid(), os.getgroups()) == (NOBODY, NOGROUP, [NOGROUP])
        with pytest.raises(PermissionError):
            (mine / "x").touch()
    assert (os.geteuid(), os.getegid(), os.getgroups()) == (0, 0, groups)

    def refused() -> None:
        with later.at_work():
            raise ConfigError("no")

    with pytest.raises(ConfigError, match=r"no \(with the rights of nbdkit's -u nobody -g nogroup\)"):
        refused()
    assert (os.geteuid(), os.getegid(), os.getgroups()) == (0, 0, groups)
    assert stat.S_IMODE(mine.stat().st_mode) == 0o700
