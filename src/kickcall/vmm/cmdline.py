"""What a QEMU command line says of a machine: its names and its QMP monitors. Pure."""

from __future__ import annotations

import json
import re
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
    """The monitors that anybody may use."""
    uuid: str = ""
    number: str = ""
    """Proxmox VE's VMID: its QEMU knows the option `-id`."""
    libvirt: SocketSpec | None = None
    """The monitor that libvirt made for itself; None where another one started this QEMU."""


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
            return dict(_flatten(value)) if isinstance(value, dict) else {}
        except (ValueError, RecursionError):
            return {}
    return split_options(text, implied)


# QAPI's ChardevAdd nests the address (`backend.data.addr.data.path`); a command line does not.
_NESTED = (
    "",
    "addr.",
    "addr.data.",
    "backend.",
    "backend.data.",
    "backend.addr.",
    "backend.data.addr.",
    "backend.data.addr.data.",
    "data.addr.data.",
)
_NUMBER = re.compile(r"[0-9]{1,9}")
_NOT_PLAIN = ("telnet", "tn3270", "websocket", "tls-creds")
"""Options that put another protocol between the socket and QMP."""


def _get(options: Mapping[str, str], key: str) -> str | None:
    return next((options[nest + key] for nest in _NESTED if nest + key in options), None)


def _is_on(value: str | None) -> bool:
    return value in ("on", "yes", "true", "y")  # util/cutils.c, qapi_bool_parse


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and _NUMBER.fullmatch(text) else None


def _socket(options: Mapping[str, str]) -> SocketSpec | None:
    """Return where a socket character device listens; None where QEMU is the socket's client."""
    if not _is_on(_get(options, "server")):
        return None
    if any(_get(options, key) not in (None, "off", "no", "false", "n") for key in _NOT_PLAIN):
        return None
    if (path := _get(options, "path")) is not None:
        if _is_on(_get(options, "abstract")):
            return SocketSpec(abstract=path)
        return SocketSpec(path=path)
    if (fd := _number(_get(options, "fd") or _get(options, "str"))) is not None:
        return SocketSpec(fd=fd)
    if (port := _number(_get(options, "port"))) is not None:
        return SocketSpec(tcp=(_get(options, "host") or "localhost", port))
    return None


def _chardev(text: str) -> tuple[str, SocketSpec] | None:
    """Return id and address of `-chardev socket,…`; None for a device of another kind."""
    options = _options(text, "backend")
    if "socket" not in (options.get("backend"), options.get("backend.type")):
        return None
    if text.startswith("{") and _get(options, "server") is None:
        options["server"] = "on"  # ChardevSocket's default (qapi/char.json); not -chardev's
    spec = _socket(options)
    return None if spec is None else (options.get("id", ""), spec)


def _legacy(text: str) -> SocketSpec | None:
    """Return where `-qmp DEV` listens (QEMU: chardev/char.c, qemu_chr_parse_compat)."""
    kind, _, rest = text.partition(":")
    if kind == "unix":
        return _socket(split_options(rest, "path"))
    if kind == "tcp":
        options = split_options(rest, "address")
        host, _, options["port"] = options.get("address", "").rpartition(":")
        options["host"] = host.removeprefix("[").removesuffix("]")
        return _socket(options)
    return None


_OPTIONS = frozenset({"name", "uuid", "id", "qmp", "qmp-pretty", "chardev", "mon"})
_LIBVIRTS = "charmonitor"
"""What libvirt calls the character device of its monitor (libvirt: qemu_command.c,
qemuBuildMonitorCommandLine), since version 0.7 and in 12. It gives each domain a `-uuid`, too."""


def parse(arguments: Sequence[str]) -> CommandLine:
    """Return what the arguments of a QEMU process say (without argv[0] or with it).

    Options may be written with one dash or two; what is not understood is passed over.
    """
    name = uuid = number = ""
    chardevs: dict[str, SocketSpec] = {}
    monitors: list[str | SocketSpec] = []
    words = iter(arguments)
    for word in words:
        option = word.removeprefix("-").removeprefix("-")
        if option == word or option not in _OPTIONS or (value := next(words, None)) is None:
            continue
        match option:
            case "name":
                name = _options(value, "guest").get("guest", name)
            case "uuid":
                uuid = value
            case "id":
                number = value
            case "qmp" | "qmp-pretty":
                if value.startswith("chardev:"):
                    monitors.append(value.removeprefix("chardev:"))
                elif (spec := _legacy(value)) is not None:
                    monitors.append(spec)
            case "chardev":
                if (device := _chardev(value)) is not None:
                    chardevs[device[0]] = device[1]
            case "mon":
                options = _options(value, "chardev")
                if options.get("mode") == "control":
                    monitors.append(options.get("chardev", ""))
    libvirt = None
    if uuid and _LIBVIRTS in monitors:
        monitors.remove(_LIBVIRTS)
        libvirt = chardevs.get(_LIBVIRTS)
    found = [chardevs.get(monitor) if isinstance(monitor, str) else monitor for monitor in monitors]
    usable = tuple(spec for spec in found if spec is not None)
    return CommandLine(name, usable, uuid, number, libvirt)
