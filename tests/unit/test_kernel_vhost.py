"""Is a vhost queue's worker found in every form that kernels gave it?

6.1 and Debian's 6.12.107 as their BTF has them; 6.4 as in drivers/vhost/vhost.h.
"""

from __future__ import annotations

import struct

import drgn
import pytest

from btf_blob import Blob
from kickcall.host.btf import Kind, Types
from kickcall.host.kernel.types import BtfTypes
from kickcall.host.kernel.vhost import call_context, worker_of

AT = 0xFFFF888000001000
TASK, OTHER, WORKER, THREAD, DEVICE, QUEUE = (AT + 256 * number for number in range(6))


class Layouts(Blob):
    """The structs of a kernel, members by name at 8 bytes each, all of them pointers."""

    def __init__(self) -> None:
        super().__init__()
        self.char = self.integer("char", 1, signed=True)
        self.int = self.integer("int", 4, signed=True)
        comm = self.add(Kind.ARRAY, "", 0, self.char, self.int, 16)
        self.structure("task_struct", 24, ("pid", self.int, 0), ("comm", comm, 64))
        self.known = {"task_struct": self.next - 1}

    def pointers(self, name: str, **members: str) -> None:
        words = []
        for at, (member, target) in enumerate(members.items()):
            pointer = self.add(Kind.PTR, "", self.known[target])
            words.append((member, pointer, 64 * at))
        self.known[name] = self.structure(name, 8 * len(words), *words)


def program(layouts: Layouts, memory: dict[int, bytes]) -> drgn.Program:
    whole = bytearray(256 * 6)
    for address, content in memory.items():
        whole[address - AT : address - AT + len(content)] = content
    whole[0:24] = struct.pack("<i4x16s", 1250, b"vhost-1234")
    whole[256:280] = struct.pack("<i4x16s", 1251, b"other")
    made = drgn.Program(
        drgn.Platform(
            drgn.Architecture.X86_64,
            drgn.PlatformFlags.IS_64_BIT | drgn.PlatformFlags.IS_LITTLE_ENDIAN,
        )
    )

    def read(_address: int, count: int, offset: int, _physical: bool) -> bytes:
        return bytes(whole[offset : offset + count])

    made.add_memory_segment(AT, len(whole), read, False)
    types = Types(layouts.done())
    made.register_type_finder("btf", BtfTypes(made, types).find, enable_index=0)
    return made


def worker_pid(made: drgn.Program) -> int | None:
    device = drgn.Object(made, "struct vhost_dev", address=DEVICE)
    queue = drgn.Object(made, "struct vhost_virtqueue *", value=QUEUE)
    found = worker_of(device, queue)
    return int(found.pid) if found else None


def pack(*pointers: int) -> bytes:
    return struct.pack(f"<{len(pointers)}Q", *pointers)


@pytest.mark.parametrize(("pointer", "pid"), [(TASK, 1250), (0, None)])
def test_a_task_of_the_device(pointer: int, pid: int | None) -> None:
    layouts = Layouts()
    layouts.pointers("vhost_dev", worker="task_struct")
    layouts.pointers("vhost_virtqueue", dev="vhost_dev")
    assert worker_pid(program(layouts, {DEVICE: pack(pointer), QUEUE: pack(DEVICE)})) == pid


def test_a_worker_of_the_device() -> None:
    layouts = Layouts()
    layouts.pointers("vhost_task", task="task_struct")
    layouts.pointers("vhost_worker", vtsk="vhost_task")
    layouts.pointers("vhost_dev", worker="vhost_worker")
    layouts.pointers("vhost_virtqueue", dev="vhost_dev")
    memory = {DEVICE: pack(WORKER), WORKER: pack(THREAD), THREAD: pack(TASK), QUEUE: pack(DEVICE)}
    assert worker_pid(program(layouts, memory)) == 1250


@pytest.mark.parametrize(
    ("kthread", "vtsk", "pid"), [(0, THREAD, 1250), (OTHER, 0, 1251), (0, 0, None)]
)
def test_a_worker_of_the_queue_with_either_kind_of_thread(
    kthread: int, vtsk: int, pid: int | None
) -> None:
    layouts = Layouts()
    layouts.pointers("vhost_task", task="task_struct")
    layouts.pointers("vhost_worker", kthread_task="task_struct", vtsk="vhost_task")
    layouts.pointers("vhost_dev", first="vhost_worker")
    layouts.pointers("vhost_virtqueue", dev="vhost_dev", worker="vhost_worker")
    memory = {WORKER: pack(kthread, vtsk), THREAD: pack(TASK), QUEUE: pack(DEVICE, WORKER)}
    assert worker_pid(program(layouts, memory)) == pid


def test_a_call_context_stands_alone_or_in_a_struct_of_its_own() -> None:
    layouts = Layouts()
    layouts.known["eventfd_ctx"] = layouts.structure("eventfd_ctx", 8, ("count", layouts.int, 0))
    layouts.pointers("vhost_vring_call", ctx="eventfd_ctx", producer="task_struct")
    layouts.structure("vhost_virtqueue", 16, ("call_ctx", layouts.known["vhost_vring_call"], 0))
    made = program(layouts, {QUEUE: pack(THREAD, 0)})
    queue = drgn.Object(made, "struct vhost_virtqueue", address=QUEUE)
    assert call_context(queue).value_() == THREAD
    layouts = Layouts()
    layouts.known["eventfd_ctx"] = layouts.structure("eventfd_ctx", 8, ("count", layouts.int, 0))
    layouts.pointers("vhost_virtqueue", call_ctx="eventfd_ctx")
    made = program(layouts, {QUEUE: pack(THREAD)})
    queue = drgn.Object(made, "struct vhost_virtqueue", address=QUEUE)
    assert call_context(queue).value_() == THREAD
