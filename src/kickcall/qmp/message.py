"""What do QMP's messages look like, and how does a reply find its way back to who asked?

Replies are passed on as QEMU wrote them, byte for byte but for the id. Ids of several clients may
be equal, so each request goes up with an id of ours. The client's own travels inside it, as
`[ours, theirs]`: so QEMU itself echoes it, in QEMU's own way of writing values. Pure.
"""

from __future__ import annotations

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
    reply = _decode_reply(line)
    result = None if reply.result is msgspec.UNSET else reply.result
    error = None if reply.error is msgspec.UNSET else reply.error
    if reply.id is msgspec.UNSET:
        return Answer(None, None, line, result, error)
    raw = bytes(reply.id)
    echo = None
    if raw[:1] == b"[":
        digits, _, rest = raw[1:].partition(b",")
        echo = rest.strip()[:-1].rstrip()
    else:
        digits = raw
    if not digits.isdigit():
        return Answer(None, None, line, result, error)
    return Answer(int(digits), echo, _with_id(line, raw, echo, result, error), result, error)


def _with_id(
    line: bytes,
    raw: bytes,
    echo: bytes | None,
    result: msgspec.Raw | None,
    error: msgspec.Raw | None,
) -> bytes:
    # QEMU writes a dict in the order of its hash table: the id stands first beside an error and
    # last beside a result, in every version so far. The general way out is at the end.
    head, tail = b'{"id": ' + raw, b', "id": ' + raw + b"}"
    if line.startswith(head):
        rest = line[len(head) :]
        return b"{" + rest[2:] if echo is None else b'{"id": ' + echo + rest
    if line.endswith(tail):
        return line[: -len(tail)] + (b"}" if echo is None else b', "id": %b}' % echo)
    return (
        _reply(b"error", bytes(error), echo)
        if error
        else _reply(b"return", bytes(result or b"{}"), echo)
    )


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


def echo_of(members: Mapping[str, bytes]) -> bytes | None:
    """Return a client's id for a reply that QEMU has no part in, spaced as QEMU spaces values."""
    own = members.get("id")
    if own is None or own[:1] not in b"[{":
        return own
    return msgspec.json.format(own, indent=0)
