# SPDX-License-Identifier: BSD-3-Clause
"""QMP in this process, with many more inputs than a socket allows: the parser against Python's own, the argument check
against a second reading of the table, and the whole session over the real command table."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replication.conditions import Conditions
from replication.control import qmp
from replication.control.commands import TABLE, Commands
from replication.control.qmp import Argument, Session, check_arguments
from replication.errors import CommandError
from replication.stage import Mode

FUZZ = settings(
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

SECONDS_MAX = 10.0
"""For one message of the largest size; measured is less than 1 s."""

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**66), 2**66)
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from([2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**400, 1e308, "\ud800", "\udfff\ud800", "\0"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


# -- the parser ------------------------------------------------------------------------------------------------


class NotQmp(Exception):
    """What Python's parser takes and QMP does not."""


def expected(text: bytes) -> Any:
    """What the parser has to make of a message, by Python's own; NotQmp or another ValueError where it must refuse."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in found}) != len(found):
            raise NotQmp
        return dict(found)

    def integer(digits: str) -> int | float:
        # Python refuses more digits than this; no number so long fits into 64 bits.
        number = int(digits[:30])
        return number if len(digits) < 30 and -(2**63) <= number < 2**64 else real(digits)

    def real(digits: str) -> float:
        if math.isinf(float(digits)):
            raise NotQmp
        return float(digits)

    def constant(_: str) -> None:
        raise NotQmp

    value = json.loads(
        text.decode(), object_pairs_hook=pairs, parse_int=integer, parse_float=real, parse_constant=constant
    )
    json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError for half a surrogate pair
    return value


def same(one: Any, other: Any) -> bool:
    """Equal in value and in type: 1, 1.0 and true are three things."""
    return repr(one) == repr(other)


PIECES = st.sampled_from(
    [
        *(b'{"a":1}', b'"a":', b'"a"', b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u", b"\\ud800", b"\\udc00"),
        *(b"\\u0000", b"0", b"-", b"1e5", b"1e999", b"-1E-999", b"00", b".5", b"NaN", b"Infinity", b"-Infinity"),
        *(b"true", b"null", b"nul", b"\xed\xa0\x80", b"\xc3\xa9", b"\xc3", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf"),
        *(b"9" * 25, b"9" * 5000, b" ", b"\t", b"\r", b"/**/", b"'a'", b"\x7f", b"\xe2\x80\xa8"),
    ]
)


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    """Valid JSON, then up to four accidents."""
    value = draw(VALUES)
    text = bytearray(json.dumps(value, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass"))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(text)))
        match draw(st.integers(0, 2)):
            case 0:
                text[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case 1:
                del text[at : at + draw(st.integers(1, 6))]
            case 2:
                text[at:at] = draw(PIECES)
    return bytes(text)


@settings(FUZZ, max_examples=3000)
@given(text=documents() | st.lists(PIECES, max_size=8).map(b"".join))
def test_the_parser_takes_what_is_json_and_refuses_what_is_not(text: bytes) -> None:
    try:
        wanted = expected(text)
    except (ValueError, NotQmp):
        with pytest.raises(qmp._Fault) as caught:
            qmp.parse(text)
        assert str(caught.value).startswith("JSON parse error, ")
        assert len(str(caught.value).splitlines()) == 1
        return
    got = qmp.parse(text)
    assert same(got, wanted)
    # Whatever was taken can be sent back: an `id` is echoed.
    assert same(json.loads(qmp.encode({"id": got}))["id"], got)


LARGEST = qmp.MESSAGE_BYTES_MAX - 10
LARGE: dict[str, Callable[[int], bytes]] = {
    "digits": lambda size: b"7" * size,
    "signed exponent": lambda size: b"1e-" + b"7" * size,
    "fraction": lambda size: b"0." + b"3" * size,
    "half surrogates": lambda size: b'"' + rb"\ud83d" * (size // 6) + b'"',
    "escaped backslashes": lambda size: b'"' + rb"\\" * (size // 2) + b'"',
    "empty lists": lambda size: b"[" + b"[]," * (size // 3) + b"[]]",
    "empty names": lambda size: b"{" + b'"":0,' * (size // 5) + b'"":0}',
    "colliding hashes": lambda size: b"{" + b",".join(b'"%x":0' % (n << 61) for n in range(size // 25)) + b"}",
    "accents": lambda size: b'"' + "é".encode() * (size // 2) + b'"',
    "strings": lambda size: b"[" + b'"",' * (size // 3) + b'""]',
}


@pytest.mark.parametrize("kind", LARGE)
def test_the_largest_message_takes_a_bounded_time_whole_or_in_pieces(kind: str) -> None:
    message = b'{"execute":"x","id":[' + LARGE[kind](LARGEST - 30) + b"]}"
    assert len(message) <= qmp.MESSAGE_BYTES_MAX
    for size in (len(message), 4093):
        session = Session(Commands(Recorder(), lambda: None).execute)
        begun = time.process_time()
        answers = [a for at in range(0, len(message), size) for a in session.feed(message[at : at + size])]
        assert time.process_time() - begun < SECONDS_MAX
        assert len(answers) == 1


# -- the argument check ----------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[Any], bool]] = {
    "boolean": lambda value: value is True or value is False,
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}
DECLARED = st.dictionaries(
    st.sampled_from(["a", "b", "c"]),
    st.builds(
        Argument,
        st.sampled_from(sorted(KINDS)),
        required=st.booleans(),
        values=st.sampled_from([(), ("x",), ("x", "y")]),
    ).map(lambda argument: argument if argument.type == "string" else Argument(argument.type, argument.required)),
)
ROWS = st.sampled_from([command.arguments for command in TABLE.values()]) | DECLARED


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Argument], dict[str, Any]]:
    """A declaration, and arguments that have something to do with it."""
    declared = dict(draw(ROWS))
    hints = sorted({value for argument in declared.values() for value in argument.values})
    values = SCALARS | st.sampled_from([*hints, "", [], {}, True, False, 0, 1])
    names = st.sampled_from([*declared, "bogus", "a", ""])
    return declared, draw(st.dictionaries(names, values, max_size=4))


@settings(FUZZ, max_examples=3000)
@given(call=calls())
def test_the_argument_check_says_what_the_declaration_says(
    call: tuple[dict[str, Argument], dict[str, Any]],
) -> None:
    declared, given_arguments = call
    fine = (
        given_arguments.keys() <= declared.keys()
        and all(name in given_arguments for name, argument in declared.items() if argument.required)
        and all(
            KINDS[declared[name].type](value) and (not declared[name].values or value in declared[name].values)
            for name, value in given_arguments.items()
        )
    )
    if fine:
        check_arguments(declared, given_arguments)
    else:
        with pytest.raises(CommandError, match=r"^(Invalid parameter type for|Parameter) '"):
            check_arguments(declared, given_arguments)


# -- the session over the real table ---------------------------------------------------------------------------


class Recorder:
    """A node that notes what it is asked for, and checks that it gets values and no objects of the parser."""

    ANSWERS: Mapping[str, Any] = {"checkpoint": (1, 0.5), "query": {}, "query_jobs": []}

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Whatever the table asks of a node."""

        def noted(*values: Any, **named: Any) -> Any:
            allowed = (bool, int, str, dict, Mode, Conditions, type(None))  # an epoch or a rate, a lineage
            assert all(type(value) in allowed for value in (*values, *named.values()))
            self.asked.append(name)
            return self.ANSWERS.get(name)

        return noted


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """Something like a request for a command of the table."""
    name = draw(st.sampled_from(sorted(TABLE)))
    declared = TABLE[name].arguments
    hints = sorted({value for argument in declared.values() for value in argument.values})
    values = st.sampled_from([True, False, "disk0", *hints]) | VALUES
    arguments = draw(st.dictionaries(st.sampled_from([*declared, "bogus"]), values, max_size=4))
    request: dict[str, Any] = {"execute": name, "arguments": arguments, "id": draw(SCALARS)}
    for member in draw(st.lists(st.sampled_from(sorted(request)), max_size=1)):
        if draw(st.booleans()):
            del request[member]
        else:
            request[member] = draw(VALUES)
    return request


@settings(FUZZ, max_examples=1500)
@given(batch=st.lists(requests(), min_size=1, max_size=5), cuts=st.lists(st.integers(0, 2000), max_size=5))
def test_a_request_reaches_the_node_only_when_every_check_has_passed(
    batch: list[dict[str, Any]], cuts: list[int]
) -> None:
    node = Recorder()
    ended: list[bool] = []
    session = Session(Commands(node, lambda: ended.append(True)).execute)
    list(session.feed(b'{"execute": "qmp_capabilities"}'))
    data = b"\n".join(json.dumps(request).encode() for request in batch)
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        answers = [
            json.loads(answer) for start, stop in itertools.pairwise(edges) for answer in session.feed(data[start:stop])
        ]
    assert said.getvalue() == "", "an internal error"
    assert len(answers) == len(batch)
    taken = sum("return" in answer for answer in answers)
    asking = sum(
        "return" in answer and request.get("execute") == "quit" for request, answer in zip(batch, answers, strict=True)
    )
    assert len(ended) == asking
    assert len(node.asked) <= taken, "what was refused has asked nothing of the node"
