"""How does a user write a lab machine's parts? A device: `virtio-blk,iothread=on,queues=2`"""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_type_hints

from kickcall.errors import LabError
from kickcall.lab import spec as specs
from kickcall.lab.board import BOARDS, BoardName
from kickcall.lab.spec import AnyDevice, OtherDevice

_KINDS = {name: kind for name, kind in specs.KINDS.items() if kind is not OtherDevice}
_SWITCH = {"on": True, "off": False}
# Not for users: `options` is what any other word becomes, `slot` is only for tests.
_NOT_WRITTEN = {"options", "driver"}


def parse_device(text: str) -> AnyDevice:
    """Return the device that `KIND,NAME=VALUE,…` means.

    A kind that the lab does not know is a QEMU driver, as `virtio-rng-pci`; a name that it does
    not know is a property of QEMU's device, as `vectors=0`. QEMU itself refuses the wrong ones.
    Raises LabError for a value that does not fit.
    """
    word, *settings = text.split(",")
    kind = _KINDS.get(word, OtherDevice)
    fields: dict[str, Any] = {} if word in _KINDS else {"driver": word}
    # `legacy` and the like are Literal types: their hints name what may be written.
    hints = get_type_hints(kind, vars(specs))
    known = {field.name for field in dataclasses.fields(kind)} - _NOT_WRITTEN
    options: list[str] = []
    if not word or "=" in word:
        raise LabError(f"a lab device starts with its kind, as {', '.join(_KINDS)}: {text!r}")
    for setting in settings:
        name, separator, value = setting.partition("=")
        if not (name and separator and value):
            raise LabError(f"{setting!r} in the lab device {text!r} is not NAME=VALUE")
        field = name.replace("-", "_")
        if field in known:
            fields[field] = _value(text, name, value, hints[field])
        else:
            options.append(setting)
    return kind(**fields, options=tuple(options))


def parse_board(text: str) -> BoardName:
    """Return the board that `text` names. Raises LabError for another word."""
    if text not in BOARDS:
        raise LabError(f"the lab has no board {text!r}: take {', '.join(BOARDS)}")
    return BOARDS[text].name


def _value(text: str, name: str, value: str, hint: object) -> bool | int | str:
    if hint is bool:
        if value in _SWITCH:
            return _SWITCH[value]
        wanted = "on or off"
    elif hint is int:
        try:
            return int(value, 0)
        except ValueError:
            wanted = "a number"
    else:
        choices = get_args(hint)
        if not choices or value in choices:
            return value
        wanted = ", ".join(choices[:-1]) + f" or {choices[-1]}"
    raise LabError(f"{name} of the lab device {text!r} must be {wanted}, not {value!r}")
