# SPDX-License-Identifier: BSD-3-Clause
"""QMP as QEMU 7.2 speaks it, without a transport: bytes in, bytes out.

Invariants:

1. What a stream of bytes means does not depend on how it is cut into chunks.
2. Every complete message gets exactly one answer, in order; so does every piece of garbage. No input ends the session.
3. A session holds at most MESSAGE_BYTES_MAX of input that is not answered yet.

The input is a stream of JSON objects, not of lines: several may share a line, one may span several. The
framer finds where a message ends by counting brackets outside strings; the JSON parser sees only whole messages.
After a framing fault (a byte that no JSON text can hold there, a bracket that closes another, a bound) the
message begun so far and the rest of the line are dropped, so a newline always brings a confused client back in step
once its message is faulty. Garbage that does not begin a message is taken up to the end of its line.

Texts and the order of the checks are those of QEMU 7.2, asked with `qemu-system-x86_64 -M none -qmp stdio`. Where
QEMU answers one piece of garbage with several errors this gives one, and where QEMU prints what is not JSON (an
infinite number) this refuses. QEMU's single-quoted strings are not taken.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from replication import VERSION
from replication.errors import CommandError
from replication.log import log, log_defect
from replication.reason import Reason

# The largest real message is a few hundred bytes; this leaves room for any sane `id` and bounds a client's memory.
MESSAGE_BYTES_MAX = 1 << 20
# QEMU allows 1024, but Python's JSON parser recurses: stay far from the interpreter's own limit of 1000.
DEPTH_MAX = 64

_INT_MIN, _INT_MAX = -(1 << 63), (1 << 64) - 1
_INT_DIGITS_MAX = 20

_NOT_SPACE = re.compile(rb"[^ \t\r\n]")
# Bytes 0xC0, 0xC1 and 0xF5 to 0xFF occur nowhere in UTF-8.
_STRUCTURE = re.compile(rb'["{}\[\]\xc0\xc1\xf5-\xff]')
_STRING_END = re.compile(rb'["\\\x00-\x1f\xc0\xc1\xf5-\xff]')
_ESCAPED_BAD = re.compile(rb"[\x00-\x1f\xc0\xc1\xf5-\xff]")
_OPENER_OF = {ord("}"): ord("{"), ord("]"): ord("[")}


class _Fault(Exception):
    """This input is no QMP message; the text is the answer's `desc`."""


class Framer:
    """Cuts a stream of bytes into messages; holds at most one unfinished message."""

    def __init__(self) -> None:
        self._step: Callable[[bytes, int, list[bytes | _Fault]], int] = self._between
        self._message = bytearray()
        self._open = bytearray()  # the brackets that are open, outermost first
        self._in_string = False
        self._escaped = False

    def feed(self, data: bytes) -> list[bytes | _Fault]:
        """The messages and faults that `data` completes, in order."""
        found: list[bytes | _Fault] = []
        position = 0
        while position < len(data):
            position = self._step(data, position, found)
        return found

    # Each step below consumes part of `data` from `position` on and returns the new position.

    def _between(self, data: bytes, position: int, _found: list[bytes | _Fault]) -> int:
        start = _NOT_SPACE.search(data, position)
        if start is None:
            return len(data)
        self._step = self._in_message if start.group() in b"{[" else self._in_garbage
        return start.start()

    def _in_message(self, data: bytes, position: int, found: list[bytes | _Fault]) -> int:
        stop = min(len(data), position + MESSAGE_BYTES_MAX - len(self._message))
        if stop == position:
            return self._fail(found, position, f"JSON message size limit of {MESSAGE_BYTES_MAX} bytes exceeded")
        if self._escaped:
            self._escaped = False
            if _ESCAPED_BAD.match(data, position):
                return self._fail(found, position, "JSON parse error, invalid escape sequence in string")
            return self._keep(data, position, position + 1)
        special = (_STRING_END if self._in_string else _STRUCTURE).search(data, position, stop)
        if special is None:
            return self._keep(data, position, stop)
        at, byte = special.start(), data[special.start()]
        if byte == ord('"'):
            self._in_string = not self._in_string
        elif byte == ord("\\"):
            self._escaped = True
        elif byte in b"{[":
            self._open.append(byte)
            if len(self._open) > DEPTH_MAX:
                return self._fail(found, at, "JSON nesting depth limit exceeded")
        elif byte in b"}]":
            if self._open.pop() != _OPENER_OF[byte]:
                return self._fail(found, at, f"JSON parse error, unexpected '{byte:c}'")
        elif byte < 0x20:
            return self._fail(found, at, "JSON parse error, control character in string")
        else:
            return self._fail(found, at, "JSON parse error, invalid UTF-8")
        self._keep(data, position, at + 1)
        if not self._open:
            self._finish(found)
        return at + 1

    def _in_garbage(self, data: bytes, position: int, found: list[bytes | _Fault]) -> int:
        newline = data.find(b"\n", position)
        end = len(data) if newline < 0 else newline
        if len(self._message) + end - position > MESSAGE_BYTES_MAX:
            return self._fail(found, position, f"JSON message size limit of {MESSAGE_BYTES_MAX} bytes exceeded")
        self._keep(data, position, end)
        if newline >= 0:
            self._finish(found)
        return end

    def _dropping(self, data: bytes, position: int, _found: list[bytes | _Fault]) -> int:
        newline = data.find(b"\n", position)
        if newline < 0:
            return len(data)
        self._step = self._between
        return newline + 1

    def _keep(self, data: bytes, position: int, end: int) -> int:
        self._message += data[position:end]
        return end

    def _finish(self, found: list[bytes | _Fault]) -> None:
        found.append(bytes(self._message))
        self._reset(self._between)

    def _fail(self, found: list[bytes | _Fault], position: int, desc: str) -> int:
        found.append(_Fault(desc))
        self._reset(self._dropping)
        return position

    def _reset(self, step: Callable[[bytes, int, list[bytes | _Fault]], int]) -> None:
        self._message = bytearray()
        self._open = bytearray()
        self._in_string = self._escaped = False
        self._step = step


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _Fault("JSON parse error, duplicate key")
    return members


def _keyword(text: str) -> Any:
    # Python's parser calls this for NaN, Infinity and -Infinity, which are not JSON.
    raise _Fault(f"JSON parse error, invalid keyword '{text}'")


def _float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise _Fault("JSON parse error, number out of range")
    return number


def _integer(text: str) -> int | float:
    # What fits neither int64 nor uint64 becomes floating point, as in QEMU.
    if len(text) <= _INT_DIGITS_MAX and _INT_MIN <= (number := int(text)) <= _INT_MAX:
        return number
    return _float(text)


def parse(message: bytes) -> Any:
    """The JSON value of one framed message; raises _Fault with QEMU's "JSON parse error, ..." otherwise."""
    try:
        text = message.decode()
    except UnicodeDecodeError as error:
        raise _Fault(f"JSON parse error, invalid UTF-8 at byte {error.start}") from None
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_keyword, parse_int=_integer, parse_float=_float
        )
    except json.JSONDecodeError as error:
        raise _Fault(f"JSON parse error, {error.msg[:1].lower()}{error.msg[1:]} at character {error.pos}") from None
    if "\\u" in text:
        # Half a surrogate pair is a Python string that no file, log or terminal takes; QEMU refuses it as well.
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            raise _Fault(f"JSON parse error, \\u{code:04x} is not a valid Unicode character") from None
    return value


def encode(message: Mapping[str, Any]) -> bytes:
    """One message as it goes over the wire, line end included; TypeError or ValueError if it is not JSON."""
    return json.dumps(message, allow_nan=False).encode() + b"\r\n"


def encode_event(event: Mapping[str, Any]) -> bytes | None:
    """An event likewise; None, and a line in the log, if it is not JSON: who emits it must not fail for that."""
    try:
        return encode(event)
    except (TypeError, ValueError) as error:
        log(f"event {event.get('event')} is not JSON and was not sent: {error}")
        return None


def error_message(
    desc: str, error_class: str = "GenericError", reason: Reason | None = None, data: dict[str, Any] | None = None
) -> dict[str, Any]:
    """An error as QMP wraps it, without `id`; with the code of the reason and with data, if there are, which QMP has
    not."""
    code = {} if reason is None else {"code": reason.value}
    more = {} if data is None else {"data": data}
    return {"error": {"class": error_class, "desc": desc, **code, **more}}


def version() -> dict[str, Any]:
    """The answer of query-version: the QMP spoken here is that of QEMU 7.2."""
    return {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": f"nbdkit-replication {VERSION}"}


_TYPES: dict[str, type | tuple[type, ...]] = {
    "boolean": bool,
    "string": str,
    "integer": int,
    "number": (int, float),
    "array": list,
    "object": dict,
}


@dataclass(frozen=True)
class Argument:
    """What a command accepts under one name."""

    type: Literal["boolean", "string", "integer", "number", "array", "object"]
    required: bool = False
    values: tuple[str, ...] = ()
    """The only strings accepted; empty: any."""

    def check(self, name: str, value: Any) -> None:
        """CommandError, in QEMU's words, if `value` is not acceptable."""
        expected = _TYPES[self.type]
        # In Python a bool is an int; in QMP it is not.
        if not isinstance(value, expected) or (isinstance(value, bool) and self.type != "boolean"):
            raise CommandError(f"Invalid parameter type for '{name}', expected: {self.type}")
        if self.values and value not in self.values:
            raise CommandError(f"Parameter '{name}' does not accept value '{value}'")


def check_arguments(declared: Mapping[str, Argument], given: Mapping[str, Any]) -> None:
    """CommandError unless `given` has all that is required, of the declared types, and nothing else."""
    for name, argument in declared.items():
        if name in given:
            argument.check(name, given[name])
        elif argument.required:
            raise CommandError(f"Parameter '{name}' is missing")
    for name in given:
        if name not in declared:
            raise CommandError(f"Parameter '{name}' is unexpected")


@dataclass(frozen=True)
class Answer:
    """What a command returns, and what has to wait until that is on its way to the client."""

    value: Any
    after: Callable[[], None] | None = None


Execute = Callable[[str, dict[str, Any]], Answer]
"""`execute(command, arguments)`; raises CommandError. Never called before negotiation."""

NEGOTIATION = "qmp_capabilities"
"""The one command that the session itself answers."""


class Session:
    """One client's conversation. Not thread-safe: one thread feeds a session."""

    def __init__(self, execute: Execute) -> None:
        self._execute = execute
        self._framer = Framer()
        self._negotiated = False

    @property
    def negotiated(self) -> bool:
        """Whether the client has left capabilities negotiation: only then may it be sent events."""
        return self._negotiated

    def greeting(self) -> bytes:
        """What the server says first."""
        return encode({"QMP": {"version": version(), "capabilities": []}})

    def feed(self, data: bytes) -> Generator[bytes, None, None]:
        """Run the commands that `data` completes, one by one, and yield the answer of each.

        A command runs when its answer is asked for, and an Answer's `after` when the next one is, or when the
        generator is closed: exhaust or close it before feeding more.
        """
        for frame in self._framer.feed(data):
            try:
                if isinstance(frame, _Fault):
                    raise frame
                request = parse(frame)
            except _Fault as fault:
                yield encode(error_message(str(fault)))
                continue
            message, after = self._respond(request)
            try:
                yield message
            finally:
                # Also when the transport gives up on the client: `quit` means quit, heard or not.
                if after is not None:
                    self._run_after(after)

    def _respond(self, request: Any) -> tuple[bytes, Callable[[], None] | None]:
        identity: dict[str, Any] = {}
        if isinstance(request, dict) and "id" in request:
            identity = {"id": request["id"]}
        try:
            name, arguments = self._unpack(request)
            answer = self._dispatch(name, arguments)
            return encode({"return": answer.value} | identity), answer.after
        except CommandError as error:
            return encode(error_message(str(error), error.error_class, error.reason, error.data) | identity), None
        except Exception as error:  # noqa: BLE001
            # A defect of ours: the operator gets the trace in nbdkit's log, the client one line and its connection.
            log_defect(error)
            text = " ".join(f"{type(error).__name__}: {error}".split())
            return encode(error_message(f"Internal error, see nbdkit's log: {text}") | identity), None

    @staticmethod
    def _unpack(request: Any) -> tuple[str, dict[str, Any]]:
        """The command and its arguments; the checks of QEMU's qmp_dispatch_check_obj."""
        if not isinstance(request, dict):
            raise CommandError("QMP input must be a JSON object")
        for member, value in request.items():
            if member == "execute":
                if not isinstance(value, str):
                    raise CommandError("QMP input member 'execute' must be a string")
            elif member == "arguments":
                if not isinstance(value, dict):
                    raise CommandError("QMP input member 'arguments' must be an object")
            elif member != "id":
                # exec-oob included, as in QEMU when the capability `oob` has not been enabled.
                raise CommandError(f"QMP input member '{member}' is unexpected")
        if "execute" not in request:
            raise CommandError("QMP input lacks member 'execute'")
        return request["execute"], request.get("arguments", {})

    def _dispatch(self, name: str, arguments: dict[str, Any]) -> Answer:
        if name == NEGOTIATION:
            self._negotiate(arguments)
            return Answer({})
        if not self._negotiated:
            raise CommandError(f"Expecting capabilities negotiation with '{NEGOTIATION}'", "CommandNotFound")
        return self._execute(name, arguments)

    def _negotiate(self, arguments: dict[str, Any]) -> None:
        check_arguments({"enable": Argument("array")}, arguments)
        for index, capability in enumerate(arguments.get("enable", [])):
            Argument("string", values=("oob",)).check(f"enable[{index}]", capability)
        if self._negotiated:
            raise CommandError("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
        if arguments.get("enable"):
            raise CommandError("Capability oob not available")
        self._negotiated = True

    @staticmethod
    def _run_after(after: Callable[[], None]) -> None:
        try:
            after()
        except Exception as error:  # noqa: BLE001
            # The client has its answer already; only the log can take this.
            log_defect(error)
