"""What do QMP's messages look like, and how does a reply find its way back to who asked?

Replies are passed on as QEMU wrote them, byte for byte but for the id. Ids of several clients may
be equal, so each request goes up with an id of ours. The client's own travels inside it, as
`[ours, theirs]`: so QEMU itself echoes it, in QEMU's own way of writing values. Pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from kickcall.qmp import text

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_ID_NESTING: Final = 256
"""Of an id. The rest of a message may be nested as deep as QEMU allows; ids are parsed twice."""

NOT_AN_OBJECT: Final = "QMP input must be a JSON object"
EXPECTING_NEGOTIATION: Final = "Expecting capabilities negotiation with 'qmp_capabilities'"
NO_OOB: Final = "Capability oob not available"
"""QEMU: monitor/qmp-cmds-control.c, qmp_caps_accept."""


class Reply(msgspec.Struct, rename={"result": "return"}):
    """One message from QEMU that is no event, taken apart as far as needed."""

    id: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    result: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    error: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class ErrorBody(msgspec.Struct, rename={"class_": "class"}):
    """QMP's error."""

    class_: str
    desc: str


_decode_reply = msgspec.json.Decoder(Reply).decode
_decode_error = msgspec.json.Decoder(ErrorBody).decode


def error_body(raw: msgspec.Raw) -> ErrorBody:
    """Return the class and description of an error. Raises msgspec.DecodeError."""
    return _decode_error(raw)


def check(members: Mapping[str, bytes], oob_enabled: bool) -> str | None:
    """Return what QEMU finds wrong with a request's shape (QEMU: qapi/qmp-dispatch.c).

    Of several faults the first written is named; QEMU names them in the order of its hash table.
    """
    found = ""
    for name, value in members.items():
        if name == "execute" or (name == "exec-oob" and oob_enabled):
            if value[:1] != b'"':
                return f"QMP input member '{name}' must be a string"
            if found:
                return f"QMP input member '{name}' clashes with '{found}'"
            found = name
        elif name == "arguments":
            if value[:1] != b"{":
                return "QMP input member 'arguments' must be an object"
        elif name != "id":
            return f"QMP input member '{name}' is unexpected"
    return None if found else "QMP input lacks member 'execute'"


def command_of(members: Mapping[str, bytes]) -> str:
    """Return the command that a request names, or an empty string."""
    raw = members.get("execute") or members.get("exec-oob") or b""
    return msgspec.json.decode(raw, type=str) if raw[:1] == b'"' else ""


def id_is_too_deep(members: Mapping[str, bytes]) -> bool:
    """Whether the id is nested deeper than MAX_ID_NESTING."""
    raw = members.get("id", b"")
    if len(raw) <= 2 * MAX_ID_NESTING or raw[:1] not in b"[{":
        return False
    depth = deepest = 0
    in_string = escaped = False
    for byte in raw:
        if in_string:
            in_string = escaped or byte != 0x22
            escaped = byte == 0x5C and not escaped
        elif byte == 0x22:
            in_string = True
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest > MAX_ID_NESTING


def request(members: Mapping[str, bytes], number: int) -> bytes:
    """Return a client's request as it goes up, with the id `number` around the client's own."""
    parts = []
    for name, value in members.items():
        if name != "id":
            parts.append(b"%b:%b" % (text.encode(name), value))
    own = members.get("id")
    parts.append(b'"id":%d' % number if own is None else b'"id":[%d,%b]' % (number, own))
    return b"{%b}\n" % b",".join(parts)


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply from QEMU: whose it is and what it says."""

    number: int | None
    """The request's number, or None where QEMU gave no id (it never took the request for one)."""
    echo: bytes | None
    """The client's own id as QEMU wrote it."""
    line: bytes
    """The whole reply as the client is to see it, without a line end."""
    result: msgspec.Raw | None
    error: msgspec.Raw | None


def answer(line: bytes) -> Answer:
    """Take apart one reply from QEMU. Raises msgspec.DecodeError."""
    try:
        readable = line
        reply = _decode_reply(line)
    except msgspec.DecodeError:
        # QEMU echoes an id of 1e999 as `inf`, which is no JSON. Its place is what counts here.
        readable = _NOT_JSON.sub(_finite, line)
        reply = _decode_reply(readable)
    result = None if reply.result is msgspec.UNSET else reply.result
    error = None if reply.error is msgspec.UNSET else reply.error
    if reply.id is msgspec.UNSET:
        return Answer(None, None, line, result, error)
    raw = bytes(reply.id)
    # QEMU writes a dict in the order of its hash table: the id stands first beside an error and
    # last beside a result, in every version so far. The general way out is at the end.
    head, tail = b'{"id": ' + raw, b', "id": ' + raw + b"}"
    if readable.startswith(head):
        before, after = b'{"id": ', line[len(head) :]
        without = b"{" + after[2:]
        raw = line[len(before) : len(head)]
    elif readable.endswith(tail):
        before, after = line[: -len(raw) - 1], b"}"
        without = line[: -len(tail)] + b"}"
        raw = line[-len(raw) - 1 : -1]
    else:
        name, value = (b"error", error) if error is not None else (b"return", result or b"{}")
        before, after = b'{"%b": %b, "id": ' % (name, bytes(value)), b"}"
        without = _reply(name, bytes(value), None)
    if raw[:1] != b"[":
        number = int(raw) if raw.isdigit() else None
        return Answer(number, None, line if number is None else without, result, error)
    digits, _, rest = raw[1:].partition(b",")
    echo = rest.strip()[:-1].rstrip()
    if not digits.isdigit():
        return Answer(None, None, line, result, error)
    return Answer(int(digits), echo, before + echo + after, result, error)


_NOT_JSON: Final = re.compile(rb'"(?:[^"\\]|\\.)*+"|\b(?:inf|nan)\b')


def _finite(match: re.Match[bytes]) -> bytes:
    return match[0] if match[0][:1] == b'"' else b"0.0"


def _reply(name: bytes, value: bytes, echo: bytes | None) -> bytes:
    if echo is None:
        return b'{"%b": %b}' % (name, value)
    if name == b"error":
        return b'{"id": %b, "error": %b}' % (echo, value)
    return b'{"return": %b, "id": %b}' % (value, echo)


def success(result: bytes, echo: bytes | None) -> bytes:
    """Return the reply that carries `result` (JSON)."""
    return _reply(b"return", result, echo)


def failure(description: str, echo: bytes | None, error_class: str = "GenericError") -> bytes:
    """Return an error reply in QEMU's form."""
    body = b'{"class": %b, "desc": %b}' % (text.encode(error_class), text.encode(description))
    return _reply(b"error", body, echo)


_PLAIN: Final = re.compile(rb'0|-?[1-9][0-9]{0,17}|null|true|false|"[ !#-\[\]-~]*+"')


def plain_echo(members: Mapping[str, bytes]) -> bytes | None:
    """Return a client's id if QEMU would write it as it stands. Raises LookupError if not.

    None stands for a client that gave no id.
    """
    own = members.get("id")
    if own is None or _PLAIN.fullmatch(own):
        return own
    raise LookupError


def echo_request(members: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return a request that does nothing but make QEMU echo the same id."""
    return {"execute": b'"qmp_capabilities"', "id": members["id"]}
