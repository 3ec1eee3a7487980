"""How does `x-debug-device-event` come to stand in QEMU's own lists of its commands?

`query-commands` names commands; `query-qmp-schema` describes them and their types
(QEMU: docs/devel/qapi-code-gen.rst, "Client JSON Protocol introspection"). Pure.
"""

from __future__ import annotations

from typing import Final

import msgspec

COMMAND: Final = "x-debug-device-event"

_LIST: Final = b'{"return": ['


class _Entity(msgspec.Struct, rename="kebab"):
    name: str
    meta_type: str
    members: list[dict[str, msgspec.Raw]] | None = None
    variants: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    values: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_decode_entities = msgspec.json.Decoder(list[_Entity]).decode


def with_command(line: bytes) -> bytes:
    """Return a reply to `query-commands` that lists the command, too."""
    if not line.startswith(_LIST):
        return line
    rest = line[len(_LIST) :]
    comma = b"" if rest.startswith(b"]") else b", "
    return b'%b{"name": "%b"}%b%b' % (_LIST, COMMAND.encode(), comma, rest)


def with_schema(line: bytes, result: msgspec.Raw | None) -> bytes:
    """Return a reply to `query-qmp-schema` that describes the command, too."""
    if result is None or not line.startswith(_LIST):
        return line
    rest = line[len(_LIST) :]
    comma = b"" if rest.startswith(b"]") else b", "
    return _LIST + _entities(_decode_entities(result)) + comma + rest


def _entities(known: list[_Entity]) -> bytes:
    """Return the command and its types, in names that nothing in `known` bears.

    QEMU masks type names as decimal numbers, so that nobody relies on them; so do we. Like QEMU
    before a certain version, an enum has the deprecated `values` only where the others have.
    """
    names = {entity.name for entity in known}
    free = max((int(name) for name in names if name.isdecimal()), default=-1) + 1
    arguments, event, nothing = str(free), str(free + 1), str(free + 2)
    added: list[dict[str, object]] = []
    empty = [
        entity.name
        for entity in known
        if entity.meta_type == "object"
        and entity.members == []
        and entity.variants is msgspec.UNSET
    ]
    if empty:
        nothing = min(empty, key=lambda name: (len(name), name))
    else:
        added.append({"name": nothing, "members": [], "meta-type": "object"})
    kinds: dict[str, object] = {"name": event}
    enums = [entity for entity in known if entity.meta_type == "enum"]
    if not enums or any(entity.members is not None for entity in enums):
        kinds["members"] = [{"name": "kick"}, {"name": "call"}]
    kinds["meta-type"] = "enum"
    if any(entity.values is not msgspec.UNSET for entity in enums):
        kinds["values"] = ["kick", "call"]
    command: dict[str, object] = {
        "name": COMMAND,
        "ret-type": nothing,
        "meta-type": "command",
        "arg-type": arguments,
        "features": ["unstable"],
    }
    members = [
        {"name": "dev", "type": "str"},
        {"name": "event", "type": event},
        {"name": "queue", "type": "int"},
    ]
    added.append(command)
    added.append({"name": arguments, "members": members, "meta-type": "object"})
    added.append(kinds)
    # "[…]" without its brackets, spaced as QEMU spaces values.
    return msgspec.json.format(msgspec.json.encode(added), indent=0)[1:-1]
