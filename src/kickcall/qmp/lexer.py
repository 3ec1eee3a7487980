"""Where does a token of QMP input end? QEMU's JSON lexer, as a table.

QEMU takes more than RFC 8259: strings in single quotes, `\\'` in any string, modified UTF-8.
After a byte that fits nowhere it reports `stray '…'` and skips to the next structural character,
control character other than tab, or 0xFE/0xFF (QEMU: qobject/json-lexer.c, IN_RECOVERY). A
client that counts on that to get back in step must find it here, so the table is QEMU's, state
by state. Pure: bytes in, tokens out, however the bytes are split.
"""

from __future__ import annotations

import enum
import re
from typing import Final


class Kind(enum.IntEnum):
    """What a token is."""

    ERROR = 0
    PUNCTUATION = 1
    STRING = 2
    NUMBER = 3
    KEYWORD = 4
    TOO_LONG = 5


class _State(enum.IntEnum):
    START = 0
    RECOVERY = 1
    DOUBLE_QUOTED = 2
    DOUBLE_QUOTED_ESCAPE = 3
    SINGLE_QUOTED = 4
    SINGLE_QUOTED_ESCAPE = 5
    ZERO = 6
    DIGITS = 7
    SIGN = 8
    MANTISSA = 9
    MANTISSA_DIGITS = 10
    EXP_E = 11
    EXP_SIGN = 12
    EXP_DIGITS = 13
    KEYWORD = 14


_ANY: Final = rb"\x20-\xfd"
_DIGIT: Final = rb"0-9"

# state: the bytes it may be left by or stay in, each with the state they lead to. A byte that is
# not listed ends the token: with the kind in _ENDS_AS and the byte looked at again from START,
# or, where the state has no such kind, as an error that includes the byte.
_TABLE: Final[dict[_State, tuple[tuple[bytes, _State], ...]]] = {
    _State.START: (
        (rb" \t\r\n", _State.START),
        (rb'"', _State.DOUBLE_QUOTED),
        (rb"'", _State.SINGLE_QUOTED),
        (rb"0", _State.ZERO),
        (rb"1-9", _State.DIGITS),
        (rb"\-", _State.SIGN),
        (rb"a-z", _State.KEYWORD),
    ),
    _State.RECOVERY: ((rb"\t\x20-+\--9;-Z\\^-z|~-\xfd", _State.RECOVERY),),
    _State.DOUBLE_QUOTED: (
        (rb"\x20!#-\[\]-\xfd", _State.DOUBLE_QUOTED),
        (rb"\\", _State.DOUBLE_QUOTED_ESCAPE),
    ),
    _State.DOUBLE_QUOTED_ESCAPE: ((_ANY, _State.DOUBLE_QUOTED),),
    _State.SINGLE_QUOTED: (
        (rb"\x20-&(-\[\]-\xfd", _State.SINGLE_QUOTED),
        (rb"\\", _State.SINGLE_QUOTED_ESCAPE),
    ),
    _State.SINGLE_QUOTED_ESCAPE: ((_ANY, _State.SINGLE_QUOTED),),
    _State.ZERO: ((rb".", _State.MANTISSA),),
    _State.DIGITS: (
        (_DIGIT, _State.DIGITS),
        (rb".", _State.MANTISSA),
        (rb"eE", _State.EXP_E),
    ),
    _State.SIGN: ((rb"0", _State.ZERO), (rb"1-9", _State.DIGITS)),
    _State.MANTISSA: ((_DIGIT, _State.MANTISSA_DIGITS),),
    _State.MANTISSA_DIGITS: ((_DIGIT, _State.MANTISSA_DIGITS), (rb"eE", _State.EXP_E)),
    _State.EXP_E: ((rb"+\-", _State.EXP_SIGN), (_DIGIT, _State.EXP_DIGITS)),
    _State.EXP_SIGN: ((_DIGIT, _State.EXP_DIGITS),),
    _State.EXP_DIGITS: ((_DIGIT, _State.EXP_DIGITS),),
    _State.KEYWORD: ((rb"a-z", _State.KEYWORD),),
}

_ENDS_AS: Final[dict[_State, Kind]] = {
    _State.ZERO: Kind.NUMBER,
    _State.DIGITS: Kind.NUMBER,
    _State.MANTISSA_DIGITS: Kind.NUMBER,
    _State.EXP_DIGITS: Kind.NUMBER,
    _State.KEYWORD: Kind.KEYWORD,
}

# What _NEXT holds besides states: how a byte ends the token.
_ERROR: Final = -1
_END: Final = -2  # without the byte
_PUNCTUATION: Final = -3
_STRING: Final = -4  # with the byte, the closing quote
_RESYNC: Final = -5


def _compile() -> tuple[list[list[int]], list[re.Pattern[bytes]]]:
    """Unfold _TABLE: for each state what each byte does, and the run of bytes that stay in it."""
    following: list[list[int]] = []
    runs: list[re.Pattern[bytes]] = []
    for state in _State:
        row = [_END if state in _ENDS_AS else _ERROR] * 256
        run = b""
        for members, target in _TABLE[state]:
            matcher = re.compile(b"[" + members + b"]")
            for byte in range(256):
                if matcher.match(bytes([byte])):
                    row[byte] = target
            if target is state:
                run = b"[" + members + b"]*+"
        following.append(row)
        runs.append(re.compile(run))
    for byte in b"{}[],:":
        following[_State.START][byte] = _PUNCTUATION
    following[_State.RECOVERY] = [
        _RESYNC if target == _ERROR else target for target in following[_State.RECOVERY]
    ]
    following[_State.DOUBLE_QUOTED][ord('"')] = _STRING
    following[_State.SINGLE_QUOTED][ord("'")] = _STRING
    # A zero may not be followed by a digit (RFC 8259, 6).
    for byte in b"0123456789":
        following[_State.ZERO][byte] = _ERROR
    return following, runs


_NEXT, _RUNS = _compile()

# The tokens that make up nearly all input, whole, straight from START. Possessive: no backtracking.
_WHOLE: Final = re.compile(
    rb"[ \t\r\n]*+(?:"
    rb"([{}\[\],:])"
    rb'|("(?:[\x20!#-\[\]-\xfd]|\\[\x20-\xfd])*+")'
    rb"|(-?+(?:0|[1-9][0-9]*+)(?=[\x20\r\n,}\]]))"
    rb"|([a-z]++(?=[\x20\r\n,}\]]))"
    rb")"
)
_KIND_OF_GROUP: Final = (Kind.ERROR, Kind.PUNCTUATION, Kind.STRING, Kind.NUMBER, Kind.KEYWORD)


class Lexer:
    """Turns chunks of bytes into tokens. At most `limit` bytes of one token are kept."""

    __slots__ = ("_chunk", "_head", "_limit", "_position", "_state")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._state: int = _State.START
        self._chunk = b""
        self._position = 0
        self._head = bytearray()
        """The part of the current token that came in earlier chunks."""

    def push(self, chunk: bytes) -> None:
        """Give the next bytes. Everything given before must have been taken as tokens."""
        self._chunk = self._chunk[self._position :] + chunk
        self._position = 0

    def token(self) -> tuple[Kind, bytes] | None:
        """Return the next token, or None where more bytes are needed to tell."""
        chunk = self._chunk
        start = position = self._position
        state = self._state
        if state == _State.START and (match := _WHOLE.match(chunk, position)):
            group = match.lastindex or 0
            self._position = match.end()
            return _KIND_OF_GROUP[group], match[group]
        size = len(chunk)
        while position < size:
            # bytes.match of an empty pattern is the state's way to say that no byte stays in it.
            match = _RUNS[state].match(chunk, position)
            position = match.end() if match else position
            if state in (_State.START, _State.RECOVERY):
                start = position
            elif len(self._head) + position - start > self._limit:
                self._position, self._state = position, _State.START
                self._head.clear()
                return Kind.TOO_LONG, b""
            if position == size:
                break
            target = _NEXT[state][chunk[position]]
            if target >= 0:
                state = target
                position += 1
                continue
            if target == _RESYNC:
                state = _State.START
                continue
            if target != _END:
                position += 1
            text = bytes(self._head) + chunk[start:position]
            self._head.clear()
            self._position = position
            self._state = _State.START
            if target == _END:
                return _ENDS_AS[_State(state)], text
            if target == _STRING:
                return Kind.STRING, text
            if target == _PUNCTUATION:
                return Kind.PUNCTUATION, text
            self._state = _State.RECOVERY
            return Kind.ERROR, text
        if state not in (_State.START, _State.RECOVERY):
            self._head += chunk[start:]
        self._chunk, self._position, self._state = b"", 0, state
        return None
