"""How is a field of a queue changed in guest memory, behind the driver's and the device's backs?"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import TYPE_CHECKING

from kickcall.errors import LabError
from kickcall.host import memory
from kickcall.model import Layout
from kickcall.virtio import packed, split

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kickcall.model import QueueMap
    from kickcall.vmm.guest_memory import GuestMemory

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_writev.restype = ctypes.c_ssize_t
_U16 = struct.Struct("<H")


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


def write(pid: int, address: int, data: bytes) -> None:
    """Write into another process's memory (process_vm_writev(2)). Raises LabError."""
    buffer = ctypes.create_string_buffer(data, len(data))
    ours = _Iovec(ctypes.addressof(buffer), len(data))
    theirs = _Iovec(address, len(data))
    done = _libc.process_vm_writev(
        pid, ctypes.byref(ours), ctypes.c_ulong(1), ctypes.byref(theirs), ctypes.c_ulong(1), 0
    )
    if done != len(data):
        reason = os.strerror(ctypes.get_errno())
        raise LabError(f"cannot write {len(data)} bytes to {address:#x} of process {pid}: {reason}")


class RingFields:
    """The 16-bit fields of one queue that tell when to notify, by the spec's names.

    Split (virtio 1.4, 2.7.6 and 2.7.8): `avail_flags`, `avail_idx`, `used_event`, `used_flags`,
    `used_idx`, `avail_event`. Packed (2.8.10): `used_event` and `avail_event` are the descriptor
    position in the driver's and the device's event area, `avail_flags` and `used_flags` its flags.
    """

    def __init__(self, pid: int, ram: GuestMemory, queue: QueueMap) -> None:
        self._pid = pid
        self._ram = ram
        self.layout = queue.layout
        self.size = queue.rings.num
        avail, used, num = queue.rings.avail, queue.rings.used, queue.rings.num
        if queue.layout is Layout.PACKED:
            self._at = {
                "used_event": avail,
                "avail_flags": avail + 2,
                "avail_event": used,
                "used_flags": used + 2,
            }
        else:
            self._at = {
                "avail_flags": avail,
                "avail_idx": avail + 2,
                "used_event": avail + 4 + 2 * num,
                "used_flags": used,
                "used_idx": used + 2,
                "avail_event": used + 4 + 8 * num,
            }

    def read(self, field: str) -> int:
        """Return a field. Raises LabError where it does not lie in guest RAM."""
        raw = memory.read(self._pid, self._address(field), 2)
        if raw is None:
            raise LabError(f"{field} cannot be read: is process {self._pid} gone?")
        return int(_U16.unpack(raw)[0])

    def write(self, field: str, value: int) -> None:
        """Change a field. Raises LabError where it does not lie in guest RAM."""
        write(self._pid, self._address(field), _U16.pack(value & 0xFFFF))

    def restore(self, before: Mapping[str, int], written: Mapping[str, int]) -> None:
        """Give fields back what they said `before`, unless their owner changed them since."""
        for field, value in before.items():
            if self.read(field) == written[field]:
                self.write(field, value)

    def no_kick_wanted(self, event_idx: bool, avail_idx: int) -> dict[str, int]:
        """Return what the device writes that wants no kick for what is published next.

        With event indices it asks for its kick at an index far ahead, without them for none.
        """
        if event_idx:
            return self._event("avail_event", "used_flags", avail_idx)
        disable = packed.EVENT_FLAGS_DISABLE
        return {"used_flags": disable if self.layout is Layout.PACKED else split.USED_F_NO_NOTIFY}

    def no_call_wanted(self, event_idx: bool, used_idx: int) -> dict[str, int]:
        """Return what the driver writes that wants no call for what is completed next."""
        if event_idx:
            return self._event("used_event", "avail_flags", used_idx)
        disable = packed.EVENT_FLAGS_DISABLE
        return {
            "avail_flags": disable if self.layout is Layout.PACKED else split.AVAIL_F_NO_INTERRUPT
        }

    def _event(self, position: str, flags: str, now: int) -> dict[str, int]:
        at = {position: self._far(now)}
        return at if self.layout is Layout.SPLIT else {**at, flags: packed.EVENT_FLAGS_DESC}

    def _far(self, position: int) -> int:
        """Return an index that nothing will reach for long: a quarter or half of all the way."""
        if self.layout is Layout.SPLIT:
            return (position + 0x4000) & 0xFFFF
        at = packed.Position(position & 0x7FFF, bool(position & 0x8000))
        return at.advance(self.size // 2, self.size).encode()

    def _address(self, field: str) -> int:
        address = self._ram.translate(self._at[field], 2)
        if address is None:
            raise LabError(f"{field} at {self._at[field]:#x} does not lie in guest RAM")
        return address
