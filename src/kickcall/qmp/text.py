"""What does a JSON string of QEMU's mean, and how does QEMU write one?

QEMU's strings are modified UTF-8: NUL is written C0 80, surrogates and noncharacters are refused
(QEMU: util/unicode.c, qobject/json-parser.c parse_string, qobject/json-writer.c). Pure.
"""

from __future__ import annotations

from typing import Final

_SHORT_ESCAPES: Final = {
    ord('"'): '"',
    ord("'"): "'",
    ord("\\"): "\\",
    ord("/"): "/",
    ord("b"): "\b",
    ord("f"): "\f",
    ord("n"): "\n",
    ord("r"): "\r",
    ord("t"): "\t",
}
_SMALLEST_OF_LENGTH: Final = (0, 0, 0x80, 0x800, 0x10000, 0x200000, 0x4000000)


class BadStringError(ValueError):
    """QEMU would refuse this string; the message is what QEMU says after `JSON parse error, `."""


def _is_character(code: int) -> bool:
    """Whether QEMU takes this code point: no surrogate, no noncharacter (Unicode 15, 23.7)."""
    if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF or 0xFDD0 <= code <= 0xFDEF:
        return False
    return code & 0xFFFE != 0xFFFE


def _code_point(raw: bytes, at: int) -> tuple[int, int]:
    """Return the code point at `at`, or -1, and where the next one starts."""
    lead = raw[at]
    if lead < 0x80:
        return lead, at + 1
    if lead >= 0xFE or lead & 0x40 == 0:
        return -1, at + 1
    length = 8 - (~lead & 0xFF).bit_length()
    code = lead & (0x7F >> length)
    end = at + 1
    while end < at + length:
        if end >= len(raw) or raw[end] & 0xC0 != 0x80:
            return -1, end
        code = code << 6 | raw[end] & 0x3F
        end += 1
    overlong = code < _SMALLEST_OF_LENGTH[length] and (length, code) != (2, 0)
    return (-1 if overlong or not _is_character(code) else code), end


def _hex4(raw: bytes, at: int) -> int:
    digits = raw[at : at + 4]
    if len(digits) < 4 or digits.strip(b"0123456789abcdefABCDEF"):
        return -1
    return int(digits, 16)


def decode(token: bytes) -> str:
    """Return the text of a string token, quotes included in `token`. Raises BadStringError."""
    if b"\\" not in token and token.isascii():
        return token[1:-1].decode("ascii")
    raw = token[1:-1]
    text: list[str] = []
    at = 0
    while at < len(raw):
        if raw[at] != 0x5C:
            code, at = _code_point(raw, at)
            if code < 0:
                raise BadStringError("invalid UTF-8 sequence in string")
            text.append(chr(code))
            continue
        begin = at
        escape = raw[at + 1]
        at += 2
        if escape != ord("u"):
            if escape not in _SHORT_ESCAPES:
                raise BadStringError("invalid escape sequence in string")
            text.append(_SHORT_ESCAPES[escape])
            continue
        code = _hex4(raw, at)
        at += 4
        if 0xD800 <= code <= 0xDBFF and raw[at : at + 2] == b"\\u":
            trailing = _hex4(raw, at + 2)
            if 0xDC00 <= trailing <= 0xDFFF:
                code = 0x10000 + ((code & 0x3FF) << 10 | trailing & 0x3FF)
                at += 6
            else:
                code = -1
        if code < 0 or not _is_character(code):
            # QEMU cuts its message at 1023 bytes and shows the source as it stands.
            shown = printable((token[1:] if at > len(raw) else raw)[begin:at])
            raise BadStringError(f"{shown} is not a valid Unicode character")
        text.append(chr(code))
    return "".join(text)


def printable(raw: bytes) -> str:
    """Return `raw` as QEMU would put it into a message: up to NUL, bad sequences as U+FFFD."""
    raw = raw.split(b"\0", 1)[0]
    if raw.isascii():
        return raw.decode("ascii")
    text: list[str] = []
    at = 0
    while at < len(raw):
        code, at = _code_point(raw, at)
        text.append(chr(code) if code >= 0 else "\N{REPLACEMENT CHARACTER}")
    return "".join(text)


def encode(text: str) -> bytes:
    """Return `text` as a JSON string the way QEMU writes it: ASCII, upper-case hexadecimal."""
    if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:
        return b'"%b"' % text.encode("ascii")
    written = ['"']
    for character in text:
        code = ord(character)
        if character in _WRITTEN:
            written.append(_WRITTEN[character])
        elif 0x20 <= code < 0x7F:
            written.append(character)
        elif code > 0xFFFF:
            code -= 0x10000
            written.append(f"\\u{0xD800 | code >> 10:04X}\\u{0xDC00 | code & 0x3FF:04X}")
        else:
            written.append(f"\\u{code:04X}")
    written.append('"')
    return "".join(written).encode("ascii")


_WRITTEN: Final = {
    '"': '\\"',
    "\\": "\\\\",
    "\b": "\\b",
    "\f": "\\f",
    "\n": "\\n",
    "\r": "\\r",
    "\t": "\\t",
}
