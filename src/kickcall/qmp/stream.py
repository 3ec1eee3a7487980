"""Which messages are in a stream of QMP input, and what would QEMU say of the rest?

QMP input is a stream of JSON values, not lines: several in one write, one in many. A message ends
where its braces and brackets balance, or where they never can; what is wrong with it is reported
then, once, by the first fault (QEMU: qobject/json-streamer.c and json-parser.c). Pure.

Only what was understood is kept: a message is its members, each as strict JSON without blanks
(single quotes become double ones), so nothing that QEMU could read differently is passed on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kickcall.qmp import text
from kickcall.qmp.lexer import Kind, Lexer

MAX_BYTES: Final = 4 << 20
"""Of one message, blanks not counted. QEMU takes 64 MiB; no QMP command needs a tenth of this."""
MAX_TOKENS: Final = 256 << 10
"""Of one message (QEMU: 2 Mi): what a token costs here is more than its bytes."""
MAX_NESTING: Final = 1024
"""As in QEMU."""


@dataclass(frozen=True, slots=True)
class Message:
    """One whole JSON value; `members` is None where it is no object."""

    members: dict[str, bytes] | None


@dataclass(frozen=True, slots=True)
class BadInput:
    """A stretch of input that is no JSON value; `description` is what QEMU says of it."""

    description: str


class _Open:
    """A container that is being read."""

    __slots__ = ("as_key", "expects", "key", "keys")

    def __init__(self, expects: str, as_key: bool) -> None:
        self.expects = expects
        self.as_key = as_key
        """It stands where an object's key should: a fault, but only once it is whole."""
        self.keys: set[str] | None = set() if expects == "first key" else None
        """None in an array."""
        self.key = ""


class MessageStream:
    """Cuts bytes into messages. Give bytes with `push`, take what they hold with `next`."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._lexer = Lexer(max_bytes)
        self._reset()

    def _reset(self) -> None:
        self._braces = self._brackets = self._tokens = self._size = 0
        self._fault = ""
        self._open: list[_Open] = []
        self._members: dict[str, bytes] | None = None
        self._written = bytearray()
        """The value of the member of the outermost object that is being read."""

    def push(self, chunk: bytes) -> None:
        """Take in the next bytes of the stream."""
        self._lexer.push(chunk)

    def next(self) -> Message | BadInput | None:
        """Return the next message or fault, or None where more bytes are needed."""
        while token := self._lexer.token():
            kind, raw = token
            if kind is Kind.ERROR:
                return self._end(f"JSON parse error, stray '{text.printable(raw)}'")
            if kind is Kind.PUNCTUATION:
                if raw == b"{":
                    self._braces += 1
                elif raw == b"}":
                    self._braces -= 1
                elif raw == b"[":
                    self._brackets += 1
                elif raw == b"]":
                    self._brackets -= 1
            self._size += len(raw)
            self._tokens += 1
            # The order of the three is QEMU's.
            if kind is Kind.TOO_LONG or self._size > self._max_bytes:
                return self._end("JSON token size limit exceeded")
            if self._tokens > MAX_TOKENS:
                return self._end("JSON token count limit exceeded")
            if self._braces + self._brackets > MAX_NESTING:
                return self._end("JSON nesting depth limit exceeded")
            if not self._fault:
                self._take(kind, raw)
            if self._braces < 0 or self._brackets < 0 or not (self._braces or self._brackets):
                return self._end(f"JSON parse error, {self._fault}" if self._fault else "")
        return None

    def _end(self, description: str) -> Message | BadInput:
        members = self._members
        self._reset()
        return BadInput(description) if description else Message(members)

    def _take(self, kind: Kind, raw: bytes) -> None:
        """Check one token against the grammar; note the first fault in QEMU's words."""
        if not self._open:
            self._value(kind, raw, as_key=False)
            return
        top = self._open[-1]
        expects = top.expects
        if expects == "value":
            self._value(kind, raw, as_key=False)
        elif expects == "separator":
            self._separator(top, raw)
        elif expects == "colon":
            if raw != b":":
                self._fault = "missing : in object pair"
            else:
                self._write(raw)
                top.expects = "value"
        elif (expects == "first key" and raw == b"}") or (expects == "first value" and raw == b"]"):
            self._close(raw)
        elif expects == "first value":
            top.expects = "value"
            self._value(kind, raw, as_key=False)
        else:
            self._value(kind, raw, as_key=True)

    def _separator(self, top: _Open, raw: bytes) -> None:
        in_object = top.keys is not None
        if raw == (b"}" if in_object else b"]"):
            self._close(raw)
        elif raw == b",":
            self._write(raw)
            top.expects = "key" if in_object else "value"
        else:
            self._fault = f"expected separator in {'dict' if in_object else 'list'}"

    def _value(self, kind: Kind, raw: bytes, as_key: bool) -> None:
        if kind is Kind.PUNCTUATION:
            if raw not in b"{[":
                self._fault = "expecting value"
                return
            self._write(raw)
            if raw == b"{" and not self._open:
                self._members = {}
            self._open.append(_Open("first key" if raw == b"{" else "first value", as_key))
            return
        value = ""
        if kind is Kind.STRING:
            try:
                value = text.decode(raw)
            except text.BadStringError as fault:
                self._fault = str(fault)[:_FAULT_LIMIT]
                return
            if raw[0] == 0x27 or b"\\" in raw or not raw.isascii():
                raw = text.encode(value)
        elif kind is Kind.KEYWORD and raw not in (b"true", b"false", b"null"):
            self._fault = f"invalid keyword '{raw.decode('ascii')}'"[:_FAULT_LIMIT]
            return
        self._write(raw)
        if not as_key:
            self._complete()
        elif kind is not Kind.STRING:
            self._fault = "key is not a string in object"
        else:
            self._open[-1].key = value
            self._open[-1].expects = "colon"

    def _close(self, raw: bytes) -> None:
        self._write(raw)
        if self._open.pop().as_key:
            self._fault = "key is not a string in object"
        elif self._open:
            self._complete()

    def _complete(self) -> None:
        """A value is whole: note it under its key."""
        if not self._open:
            return
        top = self._open[-1]
        top.expects = "separator"
        if top.keys is None:
            return
        if top.key in top.keys:
            self._fault = "duplicate key"
            return
        top.keys.add(top.key)
        if len(self._open) == 1 and self._members is not None:
            self._members[top.key] = bytes(self._written)
            self._written.clear()

    def _write(self, raw: bytes) -> None:
        # Outside of a member's value there is nothing to keep.
        if self._members is not None and (
            len(self._open) > 1 or (self._open and self._open[0].expects == "value")
        ):
            self._written += raw


_FAULT_LIMIT: Final = 1023
"""QEMU formats the fault into 1024 bytes (json-parser.c, parse_error)."""
