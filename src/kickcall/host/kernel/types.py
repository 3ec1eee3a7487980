"""How does drgn get to know the kernel's types from BTF, where no debug symbols are?

drgn 0.3 reads DWARF only, and lets itself be given types one by one: a struct's members are made
when drgn looks into it, so that nobody pays for the other 100,000 types.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import drgn

from kickcall.host.btf import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kickcall.host.btf import Member, Type, Types

_KINDS = {
    drgn.TypeKind.STRUCT: (Kind.STRUCT,),
    drgn.TypeKind.UNION: (Kind.UNION,),
    drgn.TypeKind.ENUM: (Kind.ENUM, Kind.ENUM64),
    drgn.TypeKind.TYPEDEF: (Kind.TYPEDEF,),
    drgn.TypeKind.INT: (Kind.INT,),
    drgn.TypeKind.BOOL: (Kind.INT,),
}
_BOOL = 1 << 2
"""BTF_INT_BOOL among an integer's encoding bits."""


class BtfTypes:
    """A type finder for drgn: the kernel's types, and those that its modules add."""

    def __init__(self, program: drgn.Program, kernel: Types, modules: Sequence[Types] = ()) -> None:
        self._program = program
        self._kernel = kernel
        self.modules = list(modules)
        self._made: dict[tuple[int, int], drgn.Type] = {}
        # drgn asks for each object that is named by its type, and a search goes through megabytes.
        self._named: dict[tuple[str, tuple[drgn.TypeKind, ...]], drgn.Type] = {}

    def find(
        self, _program: drgn.Program, kinds: drgn.TypeKindSet, name: str, _file: str | None
    ) -> drgn.Type | None:
        """Return the type of that name, as drgn asks for it; None where no BTF has it."""
        wanted = tuple(kinds)
        made = self._named.get((name, wanted))
        if made is not None:
            return made
        for kind in wanted:
            for types in (self._kernel, *self.modules):
                found = types.find(name, _KINDS.get(kind, ()))
                if found is not None:
                    made = self._named[name, wanted] = self._make(found)
                    return made
        return None

    def _make(self, one: Type) -> drgn.Type:
        # A type's number means something within its own blob only.
        key = (id(one.types), one.id)
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = self._new(one)
        return made

    def _new(self, one: Type) -> drgn.Type:
        make, name = self._program, one.name
        match one.kind:
            case Kind.INT:
                if one.encoding & _BOOL:
                    return make.bool_type(name, one.size)
                return make.int_type(name, one.size, one.is_signed)
            case Kind.FLOAT:
                return make.float_type(name, one.size)
            case Kind.PTR:
                return make.pointer_type(self._make(one.target))
            case Kind.ARRAY:
                # BTF has 0 for a flexible array member, too.
                return make.array_type(self._make(one.target), one.count or None)
            case Kind.STRUCT:
                return make.struct_type(name or None, one.size, self._members(one))
            case Kind.UNION:
                return make.union_type(name or None, one.size, self._members(one))
            case Kind.ENUM | Kind.ENUM64:
                values = [drgn.TypeEnumerator(label, value) for label, value in one.values.items()]
                signed = any(value.value < 0 for value in values)
                under = make.int_type("int" if signed else "unsigned int", one.size, signed)
                return make.enum_type(name or None, under, values)
            case Kind.FWD:
                return self._declared(one)
            case Kind.TYPEDEF:
                return make.typedef_type(name, self._make(one.target))
            case Kind.CONST | Kind.VOLATILE | Kind.RESTRICT | Kind.TYPE_TAG:
                return self._make(one.target)
            case Kind.FUNC_PROTO:
                return make.function_type(make.void_type(), ())
            case _:
                return make.void_type()

    def _declared(self, one: Type) -> drgn.Type:
        """Return the struct or union that is only declared where it is used, if a blob has it."""
        kind = Kind.UNION if one.is_union else Kind.STRUCT
        for types in (*self.modules, self._kernel):
            if (found := types.find(one.name, (kind,))) is not None:
                return self._make(found)
        if kind is Kind.UNION:
            return self._program.union_type(one.name, None, None)
        return self._program.struct_type(one.name, None, None)

    def _members(self, one: Type) -> list[drgn.TypeMember]:
        return [
            drgn.TypeMember(self._later(member), member.name or None, member.bit_offset)
            for member in one.members
        ]

    def _later(self, member: Member) -> Callable[[], drgn.Object]:
        """Return what makes the member's type when drgn looks into it: structs refer to each other.

        The type of a bit field is an object without a value that knows how many bits it has.
        """

        def make() -> drgn.Object:
            made = self._make(member.type)
            if member.bit_size:
                return drgn.Object(self._program, made, bit_field_size=member.bit_size)
            return drgn.Object(self._program, made)

        return make
