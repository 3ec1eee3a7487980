"""How are the kernel's structures laid out, as its own type information (BTF) says?

The format: Documentation/bpf/btf.rst and include/uapi/linux/btf.h. The running kernel tells its
types in /sys/kernel/btf/vmlinux, and each module what it adds to them (split BTF) in a file of
its own beside it, readable by all. Types are decoded when they are asked for: vmlinux has 100,000.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from kickcall.errors import KernelViewError

if TYPE_CHECKING:
    from collections.abc import Iterator

BTF_FOLDER = Path("/sys/kernel/btf")
_MAGIC = 0xEB9F
_HEADER = struct.Struct("=HBBIIIII")
_SIZE_MAX = 64 << 20
"""Bytes of one BTF blob that we are ready to read; a distribution's vmlinux has 5 to 10 MiB."""
_NAME_MAX = 512
_DEPTH_MAX = 32
"""Typedefs of typedefs: as many as we follow."""
_NESTING_MAX = 8
"""Anonymous members in anonymous members: as deep as we look."""
_VOID = 0
_UNKNOWN = 1 << 40
"""Length of a kind that we do not know: it ends the pass over the types."""


class Kind(IntEnum):
    """The kinds of type (BTF_KIND_*)."""

    VOID = 0
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


_ALIASES = frozenset((Kind.TYPEDEF, Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG))
"""Kinds that are another type under a name or with a qualifier."""
_SIZED = frozenset((Kind.INT, Kind.STRUCT, Kind.UNION, Kind.ENUM, Kind.FLOAT, Kind.ENUM64))
_WORDS = {Kind.INT: 1, Kind.ARRAY: 3, Kind.VAR: 1, Kind.DECL_TAG: 1}
"""Words of four bytes that follow the three that every type has (btf.rst, 2.2)."""
_WORDS_EACH = {
    Kind.STRUCT: 3,
    Kind.UNION: 3,
    Kind.ENUM: 2,
    Kind.FUNC_PROTO: 2,
    Kind.DATASEC: 3,
    Kind.ENUM64: 3,
}
"""Words for each of the type's `vlen` members, values or parameters."""


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a struct or union: at `offset` bytes from its start.

    A bit field has its `bit_size`, and `bit_offset` counted from the start of the struct.
    """

    name: str
    offset: int
    type: Type
    bit_offset: int
    bit_size: int = 0


@dataclass(frozen=True)
class Type:
    """One type, decoded as far as it is asked for."""

    types: Types
    id: int

    @cached_property
    def _head(self) -> tuple[int, int, int]:
        return self.types._head(self.id)

    @property
    def kind(self) -> Kind:
        """What kind of type this is."""
        return Kind(self._head[1] >> 24 & 0x1F)

    @property
    def name(self) -> str:
        """The type's name; empty where it has none."""
        return self.types._string(self._head[0])

    @cached_property
    def stripped(self) -> Type:
        """What this is behind all typedefs and qualifiers."""
        one = self
        for _ in range(_DEPTH_MAX):
            if one.kind not in _ALIASES:
                return one
            one = one.target
        raise KernelViewError(f"the kernel's type {self.id} is a typedef of too many typedefs")

    @property
    def target(self) -> Type:
        """What a pointer points to, a typedef names, an array is made of."""
        if self.kind == Kind.ARRAY:
            return self.types.type(self.types._tail(self.id, 3)[0])
        if self.kind in _SIZED or self.kind == Kind.VOID:
            raise KernelViewError(f"the kernel's type {self.name!r} refers to no other")
        return self.types.type(self._head[2])

    @property
    def count(self) -> int:
        """How many elements the array has."""
        one = self.stripped
        if one.kind != Kind.ARRAY:
            raise KernelViewError(f"the kernel's type {self.name!r} is no array")
        return one.types._tail(one.id, 3)[2]

    @property
    def parameters(self) -> int:
        """How many parameters the function takes (FUNC, and the FUNC_PROTO that it refers to)."""
        one = self.target if self.kind == Kind.FUNC else self
        if one.kind != Kind.FUNC_PROTO:
            raise KernelViewError(f"the kernel's type {self.name!r} is no function")
        return one._head[1] & 0xFFFF

    @property
    def size(self) -> int:
        """Bytes that a value of this type takes."""
        one, factor = self.stripped, 1
        for _ in range(_DEPTH_MAX):
            if one.kind != Kind.ARRAY:
                break
            factor, one = factor * one.count, one.target.stripped
        if one.kind == Kind.PTR:
            return factor * 8
        if one.kind not in _SIZED:
            raise KernelViewError(f"the kernel's type {self.name!r} has no size")
        return factor * one._head[2]

    @property
    def encoding(self) -> int:
        """An integer's encoding bits (BTF_INT_SIGNED, _CHAR, _BOOL); 0 for what is none."""
        one = self.stripped
        return one.types._tail(one.id, 1)[0] >> 24 & 0xF if one.kind == Kind.INT else 0

    @property
    def is_signed(self) -> bool:
        """Whether an integer has a sign."""
        return bool(self.encoding & 1)

    @property
    def is_union(self) -> bool:
        """Whether this is a union, or the declaration of one (kind_flag of BTF_KIND_FWD)."""
        return self.kind == Kind.UNION or (self.kind == Kind.FWD and bool(self._head[1] >> 31))

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """The members as they are declared: an anonymous struct or union is one, without a name."""
        one = self.stripped
        if one.kind not in (Kind.STRUCT, Kind.UNION):
            return ()
        info = one._head[1]
        words = one.types._tail(one.id, 3 * (info & 0xFFFF))
        found = []
        for at in range(0, len(words), 3):
            bits, size = words[at + 2], 0
            if info >> 31:  # kind_flag: the size of a bit field is in the top byte
                bits, size = bits & 0xFFFFFF, bits >> 24
            name = one.types._string(words[at])
            found.append(Member(name, bits // 8, one.types.type(words[at + 1]), bits, size))
        return tuple(found)

    def member(self, path: str) -> Member:
        """Return the member `path` ("count", "wqh.lock"), looking into anonymous members, too.

        Its offset counts from the start of this type. Raises KernelViewError where there is none.
        """
        if (found := self.find(path)) is None:
            raise KernelViewError(f"this kernel's struct {self.name} has no member {path!r}")
        return found

    def find(self, path: str) -> Member | None:
        """Return the member `path`, or None where this kernel's struct has none."""
        one, start = self, 0
        found = None
        for name in path.split("."):
            if (found := _named(one, name, _NESTING_MAX)) is None:
                return None
            one, start = found.type, start + found.bit_offset
        assert found is not None  # split() gives one name at least
        return Member(found.name, start // 8, found.type, start, found.bit_size)

    @property
    def values(self) -> dict[str, int]:
        """The names of an enum's values."""
        one = self.stripped
        count, signed = one._head[1] & 0xFFFF, one._head[1] >> 31
        found = {}
        if one.kind == Kind.ENUM:
            words = one.types._tail(one.id, 2 * count)
            for at in range(0, len(words), 2):
                value = words[at + 1]
                negative = signed and value >> 31
                found[one.types._string(words[at])] = value - (1 << 32) if negative else value
        elif one.kind == Kind.ENUM64:
            words = one.types._tail(one.id, 3 * count)
            for at in range(0, len(words), 3):
                value = words[at + 1] | words[at + 2] << 32
                negative = signed and value >> 63
                found[one.types._string(words[at])] = value - (1 << 64) if negative else value
        return found


class Types:
    """All types of a kernel, or of a kernel and one of its modules.

    `base` is the kernel's: a module's blob goes on counting types and strings where that ends.
    """

    def __init__(self, blob: bytes, base: Types | None = None, source: str = "BTF") -> None:
        self.base = base
        self.source = source
        if len(blob) < _HEADER.size:
            raise KernelViewError(f"{source} is no BTF: it is too short")
        magic, version, _, header, type_at, type_len, string_at, string_len = _HEADER.unpack_from(
            blob
        )
        if magic != _MAGIC or version != 1:
            raise KernelViewError(f"{source} is no BTF of version 1 in this machine's byte order")
        type_at, string_at = header + type_at, header + string_at
        if (
            type_at % 4
            or type_len % 4
            or max(type_at + type_len, string_at + string_len) > len(blob)
        ):
            raise KernelViewError(f"{source} is damaged: its sections do not fit")
        self._strings = blob[string_at : string_at + string_len]
        self._bytes = blob[type_at : type_at + type_len]
        self._all = memoryview(self._bytes).cast("I")
        self._first = base.end if base else 1  # type 0 is void and has no record
        self._first_string = base.string_end if base else 0
        self._starts = _starts(self._all, source)

    @property
    def end(self) -> int:
        """The number after the last type's."""
        return self._first + len(self._starts)

    @property
    def string_end(self) -> int:
        """The offset after the last string."""
        return self._first_string + len(self._strings)

    def struct(self, name: str) -> Type:
        """Return `struct name`; raises KernelViewError where this kernel has none."""
        return self._known(name, (Kind.STRUCT,), "struct ")

    def union(self, name: str) -> Type:
        """Return `union name`; raises KernelViewError where this kernel has none."""
        return self._known(name, (Kind.UNION,), "union ")

    def enum(self, name: str) -> Type:
        """Return `enum name`; raises KernelViewError where this kernel has none."""
        return self._known(name, (Kind.ENUM, Kind.ENUM64), "enum ")

    def typedef(self, name: str) -> Type:
        """Return the typedef `name`; raises KernelViewError where this kernel has none."""
        return self._known(name, (Kind.TYPEDEF,), "")

    def type(self, number: int) -> Type:
        """Return type `number`."""
        if number != _VOID and number >= self.end:
            raise KernelViewError(f"{self.source} is damaged: there is no type {number}")
        if self.base and number < self._first:
            # In terms of the base alone: what it knows, it knows without us.
            return Type(self.base, number)
        return Type(self, number)

    def find(self, name: str, kinds: tuple[Kind, ...]) -> Type | None:
        """Return the type of that name that is one of `kinds`, or None."""
        for number in self._named(name):
            if (found := Type(self, number)).kind in kinds:
                return found
        return self.base.find(name, kinds) if self.base else None

    def _known(self, name: str, kinds: tuple[Kind, ...], word: str) -> Type:
        found = self.find(name, kinds)
        if found is None:
            raise KernelViewError(f"{self.source} knows no {word}{name}")
        return found

    def _named(self, name: str) -> Iterator[int]:
        """Find our own types of that name: its string first, then the words that refer to it."""
        for offset in self._offsets(name.encode()):
            word, at = struct.pack("=I", offset), -1
            while (at := self._bytes.find(word, at + 1)) >= 0:
                place = bisect_left(self._starts, at // 4)
                if at % 4 == 0 and place < len(self._starts) and self._starts[place] == at // 4:
                    yield self._first + place

    def _offsets(self, name: bytes) -> Iterator[int]:
        """Find the offsets of a string, in our own and in the base's table."""
        if self.base:
            yield from self.base._offsets(name)
        if not name or len(name) > _NAME_MAX:
            return
        at = -1
        while (at := self._strings.find(name + b"\0", at + 1)) >= 0:
            yield self._first_string + at

    def _string(self, offset: int) -> str:
        if offset < self._first_string:
            return self.base._string(offset) if self.base else ""
        at = offset - self._first_string
        end = self._strings.find(b"\0", at, at + _NAME_MAX)
        if at >= len(self._strings) or end < 0:
            raise KernelViewError(f"{self.source} is damaged: a name lies outside its strings")
        return self._strings[at:end].decode(errors="replace")

    def _head(self, number: int) -> tuple[int, int, int]:
        """Return a type's name, info and size-or-type words."""
        if number == _VOID:
            return 0, 0, 0
        at = self._starts[number - self._first]
        return self._all[at], self._all[at + 1], self._all[at + 2]

    def _tail(self, number: int, words: int) -> list[int]:
        """Return the words that follow a type's first three."""
        at = self._starts[number - self._first] + 3
        return self._all[at : at + words].tolist()


def kernel_types(module: str | None = None) -> Types:
    """Return the running kernel's types; with `module`, those that this module adds, too.

    A module that is built into the kernel adds none. Raises KernelViewError without BTF.
    """
    types = _vmlinux()
    if module is None or not (path := BTF_FOLDER / module.replace("-", "_")).exists():
        return types
    return Types(_read(path), types, str(path))


@lru_cache(maxsize=1)
def _vmlinux() -> Types:
    path = BTF_FOLDER / "vmlinux"
    return Types(_read(path), source=str(path))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            blob = file.read(_SIZE_MAX + 1)
    except OSError as exc:
        raise KernelViewError(
            f"the kernel does not tell its types: {path}: {exc.strerror} "
            "(it needs a kernel with CONFIG_DEBUG_INFO_BTF)"
        ) from exc
    if len(blob) > _SIZE_MAX:
        raise KernelViewError(f"{path} is larger than {_SIZE_MAX >> 20} MiB")
    return blob


def _starts(words: memoryview[int], source: str) -> array[int]:
    """Return at which word each type begins: the one pass over all types, kept tight."""
    fixed = [0 if number in set(Kind) else _UNKNOWN for number in range(32)]
    each = [0] * 32
    for known, size in _WORDS.items():
        fixed[known] = size
    for known, size in _WORDS_EACH.items():
        each[known] = size
    found = array("I")
    append = found.append
    at, end = 0, len(words)
    try:
        while at < end:
            append(at)
            info = words[at + 1]
            kind = info >> 24 & 0x1F
            at += 3 + fixed[kind] + each[kind] * (info & 0xFFFF)
    except IndexError:  # a type begins in the last word
        at = end + 1
    if at > end + _UNKNOWN // 2:
        raise KernelViewError(f"{source} has a kind of type that is later than this kickcall")
    if at != end:
        raise KernelViewError(f"{source} is damaged: its last type is cut off")
    return found


def _named(one: Type, name: str, depth: int) -> Member | None:
    """Find a member of that name in a struct, and in its anonymous members."""
    if depth == 0:
        return None
    for member in one.members:
        if member.name == name:
            return member
        if member.name or not member.type.members:
            continue
        if (inner := _named(member.type, name, depth - 1)) is not None:
            bits = member.bit_offset + inner.bit_offset
            return Member(name, bits // 8, inner.type, bits, inner.bit_size)
    return None
