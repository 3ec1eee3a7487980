"""BTF blobs for tests, built type by type as include/uapi/linux/btf.h has them."""

from __future__ import annotations

import struct

from kickcall.host.btf import Kind


class Blob:
    """A BTF blob that is built type by type."""

    def __init__(self, first: int = 1, first_string: int = 0) -> None:
        self.strings = b"\0" if first_string == 0 else b""
        self.types = b""
        self.next = first
        self.first_string = first_string

    def string(self, text: str) -> int:
        if not text:
            return 0
        at = self.first_string + len(self.strings)
        self.strings += text.encode() + b"\0"
        return at

    def add(
        self, kind: Kind, name: str, last: int, *words: int, vlen: int = 0, flag: int = 0
    ) -> int:
        info = flag << 31 | kind << 24 | vlen
        self.types += struct.pack(f"={3 + len(words)}I", self.string(name), info, last, *words)
        self.next += 1
        return self.next - 1

    def integer(self, name: str, size: int, signed: bool = False) -> int:
        return self.add(Kind.INT, name, size, int(signed) << 24 | size * 8)

    def structure(
        self, name: str, size: int, *members: tuple[str, int, int], kind: Kind = Kind.STRUCT
    ) -> int:
        words = [
            word for member, type_, bits in members for word in (self.string(member), type_, bits)
        ]
        return self.add(kind, name, size, *words, vlen=len(members))

    def done(self) -> bytes:
        header = struct.pack(
            "=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types), len(self.strings)
        )
        return header + self.types + self.strings


def eventfd_like() -> tuple[Blob, dict[str, int]]:
    """struct ctx { int kref; union { u64 count; struct { u32 low, high; }; }; u32 ids[4]; … };"""
    blob = Blob()
    ids = {"int": blob.integer("int", 4, signed=True), "u32": blob.integer("unsigned int", 4)}
    ids["u64"] = blob.integer("unsigned long long", 8)
    ids["__u64"] = blob.add(Kind.TYPEDEF, "__u64", ids["u64"])
    halves = blob.structure("", 8, ("low", ids["u32"], 0), ("high", ids["u32"], 32))
    either = blob.structure("", 8, ("count", ids["__u64"], 0), ("", halves, 0), kind=Kind.UNION)
    array = blob.add(Kind.ARRAY, "", 0, ids["u32"], ids["u32"], 4)
    ids["head"] = blob.next
    pointer = blob.next + 1
    blob.structure("list_head", 16, ("next", pointer, 0), ("prev", pointer, 64))
    blob.add(Kind.PTR, "", ids["head"])
    const = blob.add(Kind.CONST, "", ids["head"])
    ids["ctx"] = blob.structure(
        "ctx",
        48,
        ("kref", ids["int"], 0),
        ("", either, 64),
        ("ids", array, 128),
        ("list", const, 256),
    )
    return blob, ids
