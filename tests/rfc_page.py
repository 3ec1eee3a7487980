"""How is the hunt of the RFC told in the documentation, with what was really printed?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path("docs") / "rfc.md"


class Hunt(NamedTuple):
    """What was typed and printed, in its order."""

    kernel: str
    io: str
    show: str
    eventfd_before: str
    diagnose: str
    asked: str
    answered: str
    returned: str
    eventfd_after: str
    show_after: str
    before: int
    after: int


def page(hunt: Hunt) -> str:
    """Return docs/rfc.md."""
    return f"""\
# The RFC's hunt

The debug command that kickcall brings was [proposed for QEMU in
2021](qmp.md#from-where-this-command-comes) with the story of one hang: a guest with a vhost-scsi
disk, a request in `avail`, nothing in `used`. The admin read the counter of the queue's kick in
the kernel with `crash`, kicked the queue on purpose, and read the counter again. This is that
hunt, step by step, with a QEMU that has no such command, no `crash` and no debug symbols.

All output below is real. The machine is a KVM host of [the lab](lab.md#a-kvm-host-anywhere) (Linux
{hunt.kernel}); a kernel module of the tests made KVM lose one kick between the doorbell and the
eventfd. The test that does it writes this page (`tests/kvm/test_lost_in_kernel.py`):

    KICKCALL_WRITE_DOCS=1 make kvm

## 1. The guest hangs

A read on the second CPU, so on the second request queue of the disk, which is queue 3 (0 is
control, 1 is events). It never returns:

```text
guest # {hunt.io}
```

## 2. Where does the queue stand?

```console
$ kickcall show vm0 vscsi0
```

```text
{hunt.show}
```

Queue 3 has one entry more in `avail` than in `used`: the driver asked, the device did not answer.
Either the kick did not arrive, or vhost has it and does nothing.

## 3. The counter

The RFC has the admin ask `crash` for `struct eventfd_ctx`. The kernel tells it without:

```console
$ sudo kickcall eventfd vm0 vscsi0 --queue 3 --kernel
```

```text
{hunt.eventfd_before}
```

**{hunt.before}**, in `/proc/PID/fdinfo` and in the kernel's own structure. vhost in the kernel
[never takes a kick back](path.md#what-the-counts-say): the count is every kick since the device
started. vhost has fetched less than the driver published.

## 4. Which hop?

```console
$ kickcall diagnose vm0 vscsi0 --queue 3
```

```text
{hunt.diagnose}
```

## 5. The RFC's command

On the socket of `kickcall qmp vm0 --listen /run/vm0.qmp`, by any QMP client:

```json
{hunt.asked}
```

```json
{hunt.answered}
```

The read returns at once:

```text
{hunt.returned}
```

## 6. The counter again

```console
$ sudo kickcall eventfd vm0 vscsi0 --queue 3 --kernel
```

```text
{hunt.eventfd_after}
```

**{hunt.after}**: one more, in both. The kick that was written on purpose is the only one that
came, and vhost has fetched and completed what it found. The device works, the driver had
published, and no kick had come: software between the doorbell and the eventfd lost it. That is
what the RFC's admin learned.

```console
$ kickcall show vm0 vscsi0
```

```text
{hunt.show_after}
```

## Had it been the call

`used` would be as far as `avail` in step 2, the verdict in step 4 `lost-call`, and the event in
step 5 `"call"`. There is no counter to read then, as KVM takes each call from its eventfd at once;
the [flight recorder](trace.md) counts them where they are made.
"""


def write(hunt: Hunt) -> None:
    """Write the page if asked to: in a KVM host of the lab into the folder that outlives it."""
    if os.environ.get("KICKCALL_WRITE_DOCS"):
        path = Path(os.environ.get("KICKCALL_LAB_SHARED", ROOT)) / PAGE
        path.parent.mkdir(exist_ok=True)
        path.write_text(page(hunt))
