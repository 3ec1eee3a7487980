"""What a QEMU command line says of a machine: its name and its QMP monitors. Pure."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass(frozen=True, slots=True)
class SocketSpec:
    """Where QEMU was told to listen for QMP: exactly one field is set."""

    path: str | None = None
    """A unix socket's path as written, relative to QEMU's own working directory."""
    abstract: str | None = None
    """A name in Linux's abstract socket namespace."""
    tcp: tuple[str, int] | None = None
    fd: int | None = None
    """A listening socket that was handed to QEMU, as libvirt does."""


@dataclass(frozen=True, slots=True)
class CommandLine:
    """The parts of a QEMU command line that kickcall needs."""

    name: str
    """The guest's name, empty where none was given."""
    qmp: tuple[SocketSpec, ...]


def split_options(text: str, implied: str = "") -> dict[str, str]:
    """Return the keys and values of one `key=value,key=value` argument.

    A comma is doubled to stand for itself, a bare first word is the value of the `implied` key,
    and another bare word is a boolean (QEMU: util/qemu-option.c, opts_do_parse).
    """
    parts = [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
    options: dict[str, str] = {}
    for index, part in enumerate(parts):
        key, equals, value = part.partition("=")
        if equals:
            options[key] = value
        elif index == 0 and implied:
            options[implied] = part
        elif part:
            options[part.removeprefix("no")] = "off" if part.startswith("no") else "on"
    return options


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flatten(inner, f"{prefix}{key}.")
        elif isinstance(inner, bool):
            yield f"{prefix}{key}", "on" if inner else "off"
        else:
            yield f"{prefix}{key}", str(inner)


def _options(text: str, implied: str) -> dict[str, str]:
    if text.startswith("{"):
        try:
            value = json.loads(text)
        except ValueError:
            return {}
        return dict(_flatten(value)) if isinstance(value, dict) else {}
    return split_options(text, implied)


# QAPI's ChardevAdd nests the address (`backend.data.addr.data.path`); a command line does not.
_NESTED = ("", "addr.", "addr.data.", "backend.data.addr.data.", "backend.addr.", "data.addr.data.")


def _get(options: Mapping[str, str], key: str) -> str | None:
    return next((options[nest + key] for nest in _NESTED if nest + key in options), None)


def _socket(options: Mapping[str, str]) -> SocketSpec | None:
    if (path := _get(options, "path")) is not None:
        if _get(options, "abstract") == "on":
            return SocketSpec(abstract=path)
        return SocketSpec(path=path)
    if (fd := _get(options, "fd") or _get(options, "str")) is not None and fd.isdigit():
        return SocketSpec(fd=int(fd))
    port = _get(options, "port")
    if port is not None and port.isdigit():
        return SocketSpec(tcp=(_get(options, "host") or "localhost", int(port)))
    return None


def _legacy(text: str) -> SocketSpec | None:
    """Return where `-qmp DEV` listens (QEMU: qemu-char.c, qemu_chr_parse_compat)."""
    kind, _, rest = text.partition(":")
    if kind == "unix":
        options = split_options(rest, "path")
        return _socket(options)
    if kind in ("tcp", "telnet"):
        address = split_options(rest, "address").get("address", "")
        host, _, port = address.rpartition(":")
        return SocketSpec(tcp=(host or "localhost", int(port))) if port.isdigit() else None
    return None


def parse(arguments: Sequence[str]) -> CommandLine:
    """Return what the arguments of a QEMU process say (without argv[0] or with it).

    Options may be written with one dash or two; what is not understood is passed over.
    """
    name = ""
    chardevs: dict[str, SocketSpec] = {}
    monitors: list[str | SocketSpec] = []
    for option, value in itertools.pairwise(arguments):
        if not option.startswith("-"):
            continue
        match option.lstrip("-"):
            case "name":
                name = _options(value, "guest").get("guest", name)
            case "qmp" | "qmp-pretty":
                if value.startswith("chardev:"):
                    monitors.append(value.removeprefix("chardev:"))
                elif (spec := _legacy(value)) is not None:
                    monitors.append(spec)
            case "chardev":
                options = _options(value, "backend")
                if (spec := _socket(options)) is not None:
                    chardevs[options.get("id", "")] = spec
            case "mon":
                options = _options(value, "chardev")
                if options.get("mode") == "control":
                    monitors.append(options.get("chardev", ""))
    found = [chardevs.get(monitor) if isinstance(monitor, str) else monitor for monitor in monitors]
    return CommandLine(name, tuple(spec for spec in found if spec is not None))
