"""What goes to systemd's journal, and as which fields?

The native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL): one datagram of fields an entry. A journal
that is not there, or does not keep up, is no reason to wait.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING, Any, Final

from kickcall.watch.happenings import What

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kickcall.watch.happenings import Happening

SOCKET: Final = "/run/systemd/journal/socket"
MESSAGE_ID: Final = "6b1f3c1a5d0e4f6f9c6a2a1d7b0e4c11"
"""Of everything that kickcall says, as `journalctl MESSAGE_ID=…` finds it."""
_VALUE_MOST: Final = 4 << 10

# syslog(3)'s levels.
_WARNING, _NOTICE, _INFO = 4, 5, 6
_PRIORITIES: Final = {
    What.ALERT: _WARNING,
    What.NOT_HEALED: _WARNING,
    What.REFUTED: _WARNING,
    What.STALL: _WARNING,
    What.INJECTED: _NOTICE,
    What.WOULD_INJECT: _NOTICE,
}


class Journald:
    """systemd's journal on this host. `lost` says how many entries it did not take."""

    def __init__(self, path: str | None = None) -> None:
        self._path = path or SOCKET
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self.lost = 0

    def tell(self, one: Happening) -> None:
        """Put down what happened."""
        self.put(
            {
                "MESSAGE": message(one),
                "PRIORITY": _PRIORITIES.get(one.what, _INFO),
                "KICKCALL_WHAT": str(one.what),
                "KICKCALL_MACHINE": one.machine,
                "KICKCALL_MACHINE_PID": one.pid,
                "KICKCALL_DEVICE": one.device,
                "KICKCALL_QUEUE": one.queue,
                **{f"KICKCALL_{key.upper()}": value for key, value in one.more.items()},
            }
        )

    def put(self, fields: Mapping[str, Any]) -> None:
        """Put down an entry; fields that are None are left out."""
        given = {"SYSLOG_IDENTIFIER": "kickcall", "MESSAGE_ID": MESSAGE_ID, **fields}
        entry = b"".join(
            _field(name, str(value)) for name, value in given.items() if value is not None
        )
        try:
            self._socket.sendto(entry, self._path)
        except OSError:
            self.lost += 1

    def close(self) -> None:
        """Let go of it."""
        self._socket.close()


def message(one: Happening) -> str:
    """Return what happened, where, in one line."""
    where = one.machine or "kickcall"
    if one.device is not None:
        where += f" {one.device.removeprefix('/machine/peripheral/')} queue {one.queue}"
    return f"{where}: {one.what}: {one.text}"


def is_there() -> bool:
    """Tell whether this host has such a journal."""
    return os.path.exists(SOCKET)


def is_our_output() -> bool:
    """Tell whether standard output goes to it anyway (systemd.exec(5), $JOURNAL_STREAM)."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(1)
    except OSError:
        return False
    return (device, inode) == (str(status.st_dev), str(status.st_ino))


def _field(name: str, value: str) -> bytes:
    """Return a field: `NAME=value`, or with a length where the value has lines of its own."""
    raw = value.encode(errors="replace")[:_VALUE_MOST]
    if b"\n" not in raw:
        return name.encode() + b"=" + raw + b"\n"
    return name.encode() + b"\n" + struct.pack("<Q", len(raw)) + raw + b"\n"
