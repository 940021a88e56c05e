# SPDX-License-Identifier: BSD-3-Clause
"""What the agent reads out of the environment that Pacemaker gives it."""

from __future__ import annotations

import time

import pytest

from replication.cluster.told import CLONE, read

META = "OCF_RESKEY_CRM_meta_"


def test_the_defaults() -> None:
    told = read({"OCF_RESKEY_node": "vm1", "OCF_RESOURCE_INSTANCE": "disk:1"})
    assert (told.resource, told.node, told.service, told.max_age_s) == ("disk", "vm1", "auto", 60)
    assert (told.repeated, told.event, told.active, told.wrong) == (False, "", None, {})
    assert 0 < told.left_s < 20


def test_every_action_ends_before_the_cluster_gives_it_up() -> None:
    told = read({META + "timeout": "10000"})
    assert told.deadline - time.monotonic() < 9


@pytest.mark.parametrize("timeout", ["", "0", "-3", "soon", "\u0663"])
def test_a_timeout_that_is_none(timeout: str) -> None:
    assert 0 < read({META + "timeout": timeout}).left_s < 20


def test_where_it_is_to_go_on() -> None:
    told = read(
        {
            META + "notify_active_uname": "a b",
            META + "notify_stop_uname": "b",
            META + "notify_promote_uname": "a",
            META + "notify_type": "post",
            META + "notify_operation": "stop",
        }
    )
    assert (told.active, told.to_promote, told.event) == ({"a"}, {"a"}, "post-stop")


def test_a_host_that_is_stopped_and_started_again_is_not_gone() -> None:
    lists = {"active": "a b", "stop": "a", "start": "a", "promote": "b"}
    assert read({META + f"notify_{name}_uname": hosts for name, hosts in lists.items()}).active == {"a", "b"}


@pytest.mark.parametrize("words", [("master", "slave"), ("promoted", "unpromoted")])
def test_roles_by_either_name(words: tuple[str, str]) -> None:
    told = read({META + f"notify_{words[0]}_uname": "a", META + f"notify_{words[1]}_uname": "b"})
    assert (told.active, told.promoted) == ({"a", "b"}, {"a"})


def test_nobody_is_told_of() -> None:
    assert read({META + "notify_active_uname": " "}).active == frozenset()


@pytest.mark.parametrize(
    ("name", "value", "left"),
    [
        ("max_age", "soon", None),
        ("max_age", "-1", None),
        ("max_age", "1m", None),
        ("service", "upstart", ""),
        ("node", "*", ""),
        ("node", "../x", ""),
        ("node", "", ""),
    ],
)
def test_a_parameter_that_cannot_be_used_is_noted(name: str, value: str, left: str | None) -> None:
    told = read({"OCF_RESKEY_node": "vm1", f"OCF_RESKEY_{name}": value})
    assert list(told.wrong) == [name]
    assert name in told.wrong[name]
    assert value in told.wrong[name]
    assert getattr(told, {"max_age": "max_age_s"}.get(name, name)) == left


def test_seconds_may_have_their_unit() -> None:
    assert read({"OCF_RESKEY_max_age": "90s"}).max_age_s == 90


@pytest.mark.parametrize(
    ("meta", "wrong"),
    [
        ({}, set()),
        ({"notify": "true", "promoted_max": "1", "promoted_node_max": "1", "clone_node_max": "1"}, set()),
        ({"notify": "Yes", "master_max": "1", "master_node_max": "1"}, set()),
        ({"notify": "false"}, {"notify"}),
        ({"promoted_max": "2", "master_max": "2"}, {"promoted-max"}),
        ({"master_node_max": "2"}, {"promoted-node-max"}),
        ({"clone_node_max": "0"}, {"clone-node-max"}),
    ],
)
def test_options_of_the_clone_by_which_two_could_own_the_disks(meta: dict[str, str], wrong: set[str]) -> None:
    told = read({"OCF_RESKEY_node": "vm1", **{META + name: value for name, value in meta.items()}})
    assert set(told.wrong) == wrong
    assert wrong <= set(CLONE)
