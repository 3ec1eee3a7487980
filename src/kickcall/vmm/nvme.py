"""Where does QEMU keep the queues of an NVMe controller? Found in its memory, and proved.

The guest's driver tells the controller alone which vector a completion queue interrupts by, and how
far a submission queue goes. QEMU's record of that is taken only if all of this agrees: the address
and the size of the admin queues, as the controller's registers tell them; their owner, whose
canonical path (a string in QEMU's DeviceState) is the device's QOM path; and in every queue its own
number and that owner.

With shadow doorbells (NVMe 1.3, 5.7 "Doorbell Buffer Config"; QEMU 7.1) the driver keeps each
submission queue's tail in its memory, too, and writes the register only when it is asked to.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from kickcall.errors import QmpCommandError
from kickcall.host import eventfds, memory
from kickcall.model import Notifier
from kickcall.vmm.interrupts import read_words
from kickcall.vmm.notifiers import path_matches
from kickcall.vmm.own_memory import addresses_of

if TYPE_CHECKING:
    from kickcall.vmm.monitor import Monitor
    from kickcall.vmm.pci_devices import MappedPci
    from kickcall.vmm.session import VmmSession

# NVMe 1.4, 3.1: the controller's registers, in bytes
CC, CSTS, DOORBELLS = 0x14, 0x1C, 0x1000
_AQA, _ASQ, _ACQ = 0x24, 0x28, 0x30
_REGISTERS = 0x38
READY = 1
"""CSTS.RDY, and CC.EN."""
_SHUTDOWN = 3 << 2

# hw/nvme/nvme.h, 7.2 to 10.1: struct NvmeSQueue: ctrl, sqid, cqid, head, tail, size, dma_addr,
# db_addr, ei_addr, timer or bh, notifier {rfd, wfd, initialized}, ioeventfd_enabled
_SUBMISSION = struct.Struct("<QHHIIIQQQQii?3x?3x")
# struct NvmeCQueue: ctrl, phase, cqid, irq_enabled, head, tail, vector, size, dma_addr
_COMPLETION = struct.Struct("<QBxHHxxIIIIQ")
# struct NvmeCtrl: `sq`, `cq` (arrays of pointers), then `admin_sq` itself
_ARRAYS = struct.Struct("<QQ")
_DMA_ADDRESS = 24
"""Offset of `dma_addr` in NvmeSQueue."""
_CONTROLLER_MAX = 1 << 20
"""More bytes than `struct NvmeCtrl` has."""
_PAIRS_DEFAULT, _PAIRS_MAX = 64, 0xFFFF
_HITS_MAX = 2000
"""The guest chooses where its queues are, and may choose a number that stands everywhere."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A submission queue."""

    number: int
    completion: int
    """The number of its completion queue."""
    size: int
    head: int
    """How far the controller has fetched."""
    shadow: int
    """Guest-physical address of its shadow doorbell; 0: it has none."""
    notifier: Notifier | None
    """The eventfd that a write to its doorbell signals (QEMU: `ioeventfd=on`)."""
    address: int
    """Where QEMU's record of it is."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion queue."""

    number: int
    vector: int
    interrupts: bool
    """The driver asked for interrupts; a queue that it polls has none."""
    address: int


@dataclass(frozen=True, slots=True)
class Queues:
    """The queues of a controller, by number; those with number 0 are the admin queues."""

    submissions: dict[int, Submission]
    completions: dict[int, Completion]
    doorbell_stride: int
    """Bytes from one doorbell register to the next: submission 0, completion 0, submission 1, …"""

    def doorbell(self, submission: int) -> int:
        """Return the offset of a submission queue's tail doorbell (NVMe 1.4, 3.1.24)."""
        return DOORBELLS + 2 * submission * self.doorbell_stride


def queues_of(session: VmmSession, monitor: Monitor, mapped: MappedPci, base: int) -> Queues | str:
    """Return the queues of the controller whose registers are at `base`, or why none are known."""
    words = read_words(monitor, base, _REGISTERS // 4)
    if words is None:
        return "its registers cannot be read"
    if not (words[CC // 4] & READY and words[CSTS // 4] & READY):
        return "no driver in the guest has enabled the controller (CC.EN, CSTS.RDY)"
    if words[CSTS // 4] & _SHUTDOWN:
        return "the driver in the guest has shut the controller down (CSTS.SHST)"
    sizes = words[_AQA // 4]
    asq, acq = ((words[at // 4 + 1] << 32 | words[at // 4]) & ~0xFFF for at in (_ASQ, _ACQ))
    wanted = (asq, (sizes & 0xFFF) + 1, acq, (sizes >> 16 & 0xFFF) + 1)
    stride = 4 << (words[1] & 0xF)  # CAP.DSTRD, bits 35:32
    pairs = _pairs(monitor, mapped)
    hits = addresses_of(session, struct.pack("<Q", asq))
    for hit in islice((one for one in hits if one % 8 == 0), _HITS_MAX):
        found = _controller(session.process.pid, hit - _DMA_ADDRESS, wanted, mapped, pairs)
        if found is not None:
            return Queues(*found, stride)
    return "QEMU's record of its queues was not found in QEMU's memory"


def submission_at(pid: int, address: int) -> tuple[Any, ...] | None:
    """Return QEMU's record of a submission queue as it stands: what `Submission` was made of."""
    raw = memory.read(pid, address, _SUBMISSION.size)
    return None if raw is None else _SUBMISSION.unpack(raw)


def still_is(pid: int, queue: Submission | Completion) -> bool:
    """Tell whether QEMU's record of the queue is what it was found to be, its progress aside."""
    if isinstance(queue, Completion):
        raw = memory.read(pid, queue.address, _COMPLETION.size)
        if raw is None:
            return False
        _, _, number, enabled, _, _, vector, _, _ = _COMPLETION.unpack(raw)
        return (number, vector, bool(enabled)) == (queue.number, queue.vector, queue.interrupts)
    found = submission_at(pid, queue.address)
    if found is None:
        return False
    _, number, completion, _, _, size, _, shadow, _, _, rfd, _, initialized, _ = found
    fd = rfd if initialized else None
    now = (number, completion, size, shadow, fd)
    was = queue.number, queue.completion, queue.size, queue.shadow
    return now == (*was, None if queue.notifier is None else queue.notifier.fd)


def _pairs(monitor: Monitor, mapped: MappedPci) -> int:
    asked = {"path": mapped.device.path, "property": "max_ioqpairs"}
    try:
        return min(int(monitor.execute("qom-get", asked)), _PAIRS_MAX)
    except (QmpCommandError, ValueError, TypeError):
        return _PAIRS_DEFAULT


def _controller(
    pid: int, admin: int, wanted: tuple[int, int, int, int], mapped: MappedPci, pairs: int
) -> tuple[dict[int, Submission], dict[int, Completion]] | None:
    """Return all queues of the controller whose `admin_sq` is at `admin`; None if none is there."""
    asq, submissions_size, acq, completions_size = wanted
    record = submission_at(pid, admin)
    arrays = memory.read(pid, admin - _ARRAYS.size, _ARRAYS.size)
    if record is None or arrays is None:
        return None
    owner, number, completion, _, _, size, dma, *_ = record
    if (number, completion, size, dma) != (0, 0, submissions_size, asq):
        return None
    if not (0 < admin - owner < _CONTROLLER_MAX and path_matches(pid, owner, mapped.device.path)):
        return None
    at_submissions, at_completions = _ARRAYS.unpack(arrays)
    submissions = _pointers(pid, at_submissions, pairs + 1)
    completions = _pointers(pid, at_completions, pairs + 1)
    if submissions.get(0) != admin or 0 not in completions:
        return None
    raw = memory.read(pid, completions[0], _COMPLETION.size)
    if raw is None:
        return None
    found = _COMPLETION.unpack(raw)
    if (found[0], found[2], found[7], found[8]) != (owner, 0, completions_size, acq):
        return None
    return _submissions(pid, owner, submissions), _completions(pid, owner, completions)


def _pointers(pid: int, at: int, count: int) -> dict[int, int]:
    raw = memory.read(pid, at, 8 * count)
    if raw is None:
        return {}
    return {number: one for number, (one,) in enumerate(struct.iter_unpack("<Q", raw)) if one}


def _submissions(pid: int, owner: int, places: dict[int, int]) -> dict[int, Submission]:
    states = eventfds.eventfds_of(pid)
    found = {}
    for number, address in places.items():
        record = submission_at(pid, address)
        if record is None or record[:2] != (owner, number):
            continue
        _, _, completion, head, _, size, _, shadow, _, _, rfd, wfd, initialized, used = record
        notifier = None
        if initialized and used and rfd == wfd and rfd in states and states[rfd].eventfd_id >= 0:
            notifier = Notifier(rfd, states[rfd].eventfd_id)
        found[number] = Submission(number, completion, size, head, shadow, notifier, address)
    return found


def _completions(pid: int, owner: int, places: dict[int, int]) -> dict[int, Completion]:
    found = {}
    for number, address in places.items():
        raw = memory.read(pid, address, _COMPLETION.size)
        if raw is None:
            continue
        its_owner, _, its_number, enabled, _, _, vector, *_ = _COMPLETION.unpack(raw)
        if (its_owner, its_number) == (owner, number):
            found[number] = Completion(number, vector, bool(enabled), address)
    return found
