"""What does a client ask for with `x-debug-device-event`, as QMP command or as HMP line?

The words of refusal are QEMU's, so that a client meets here what a patched QEMU would say
(QEMU: qapi/qapi-visit-core.c, qapi/qobject-input-visitor.c, monitor/hmp.c). Pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import msgspec

from kickcall.model import DeviceEvent
from kickcall.qmp.listing import COMMAND

HELP: Final = f"{COMMAND} dev event queue -- raise an event (kick or call) on a device's queue"
"""QEMU's `help` has this form."""


class BadArgumentsError(ValueError):
    """The command cannot be carried out as it was put; the message says so in QEMU's words."""


@dataclass(frozen=True, slots=True)
class EventRequest:
    """One event that a client asks for."""

    dev: str
    event: DeviceEvent
    queue: int


def _event(word: str) -> DeviceEvent:
    try:
        return DeviceEvent(word)
    except ValueError:
        raise BadArgumentsError(f"Parameter 'event' does not accept value '{word}'") from None


def from_qmp(arguments: bytes) -> EventRequest:
    """Read a QMP command's arguments (JSON). Raises BadArgumentsError."""
    try:
        given = msgspec.json.decode(arguments, type=dict[str, msgspec.Raw])
    except RecursionError:
        raise BadArgumentsError("JSON nesting depth limit exceeded") from None
    dev = _member(given, "dev", "string")
    word = _member(given, "event", "string")
    event = _event(str(word))
    queue = _member(given, "queue", "integer")
    for name in given:
        raise BadArgumentsError(f"Parameter '{name}' is unexpected")
    return EventRequest(str(dev), event, int(queue))


def _member(given: dict[str, msgspec.Raw], name: str, kind: str) -> str | int:
    raw = given.pop(name, None)
    if raw is None:
        raise BadArgumentsError(f"Parameter '{name}' is missing")
    value: str | int
    try:
        if kind == "string":
            value = msgspec.json.decode(raw, type=str)
        else:
            value = msgspec.json.decode(raw, type=int)
            if b"." in bytes(raw) or b"e" in bytes(raw).lower() or not -(2**63) <= value < 2**63:
                raise msgspec.ValidationError
    except (msgspec.DecodeError, RecursionError):
        raise BadArgumentsError(f"Invalid parameter type for '{name}', expected: {kind}") from None
    return value


_NAME: Final = re.compile(r"[ \t\r\n\v\f]*([^ \t\r\n\v\f]+)", re.ASCII)
_STRING: Final = re.compile(r'\s*(?:"((?:[^"\\]|\\[nr\\\'"])*)"|([^"\s]\S*))', re.ASCII)
_NUMBER: Final = re.compile(r"\s*([-+]?(?:0[xX][0-9a-fA-F]+|[0-9]+))\s*", re.ASCII)
_ESCAPE: Final = re.compile(r"\\(.)")


def hmp_name(line: str) -> str:
    """Return the command that an HMP line names."""
    match = _NAME.match(line)
    return match[1] if match else ""


def is_help(line: str) -> bool:
    """Whether an HMP line asks for help on our command."""
    return line.split() in (["help", COMMAND], ["?", COMMAND])


def from_hmp(line: str) -> EventRequest:
    """Read an HMP line that names the command. Raises BadArgumentsError."""
    name = _NAME.match(line)
    rest = line[name.end() :] if name else line
    words: list[str] = []
    for _ in ("dev", "event"):
        match = _STRING.match(rest)
        if not match:
            raise _usage(f"{COMMAND}: string expected")
        quoted, plain = match.groups()
        words.append(_ESCAPE.sub(_unescaped, quoted) if plain is None else plain)
        rest = rest[match.end() :]
    if not rest.strip():
        raise _usage("unexpected end of expression")
    number = _NUMBER.match(rest)
    if not number:
        raise _usage(f"invalid char '{rest.strip()[0]}' in expression")
    if number.end() != len(rest):
        raise _usage(f"{COMMAND}: extraneous characters at the end of line")
    digits = number[1]
    octal = re.fullmatch(r"[-+]?0[0-7]+", digits)
    if re.fullmatch(r"[-+]?0[0-9]+", digits) and not octal:
        raise _usage(f"{COMMAND}: extraneous characters at the end of line")
    queue = int(digits, 8) if octal else int(digits, 0)
    if not -(2**63) <= queue < 2**63:
        raise _usage("number too large")
    try:
        event = _event(words[1])
    except BadArgumentsError as fault:
        raise BadArgumentsError(f"Error: {fault}\r\n") from None
    return EventRequest(words[0], event, queue)


def _unescaped(match: re.Match[str]) -> str:
    return {"n": "\n", "r": "\r"}.get(match[1], match[1])


def _usage(fault: str) -> BadArgumentsError:
    # Unlike a QMP error an HMP one is text that the command "printed".
    return BadArgumentsError(f'{fault}\r\nTry "help {COMMAND}" for more information\r\n')
