"""What does an incident look like that tests of bundles and reports share, with any names in it?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kickcall.diagnose.states import QueueFixed, QueueRole, Sample
from kickcall.incident import facts as nouns
from kickcall.model import (
    BackendKind,
    DeviceEvent,
    Evidence,
    Holder,
    Layout,
    NotifierState,
    QueueState,
    Verdict,
    VerdictKind,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

AT = 1_795_387_356.432


def verdict(name: str, *, queue: int = 0) -> Verdict:
    """Return a lost kick of a queue of a device that is called `name`."""
    return Verdict(
        device=f"/machine/peripheral/{name}",
        queue=queue,
        verdict=VerdictKind.LOST_KICK,
        hop=3,
        since_s=2.1,
        evidence=(
            Evidence("because", f"Nobody kicked {name}.", AT),
            Evidence("avail.idx", 2, AT),
            Evidence("used.idx", 1, AT),
            Evidence("kick notifier count", 0, AT),
            Evidence(f"back-end thread 71 ({name})", "sleeping", AT),
        ),
        remedy=f"kickcall kick vm0 {name} --queue {queue}",
        event=DeviceEvent.KICK,
    )


def incident(name: str = "vm0", *, stalled: bool = True) -> nouns.Facts:
    """Return an incident in which everything that can have a name has that name."""
    path = f"/machine/peripheral/{name}"
    fixed = QueueFixed(
        path, 0, 128, Layout.SPLIT, True, BackendKind.VHOST_USER, QueueRole.REQUEST, True
    )
    kick = NotifierState(75, 0, 0o2004002)
    state = QueueState(
        *(path, 0, Layout.SPLIT, 128, BackendKind.VHOST_USER, 2, 1, None, 1, 0, 0, 1, 1),
        kick=kick,
        call=None,
    )
    found = verdict(name)
    healthy = Verdict(path, 0, VerdictKind.IDLE, 0, 0.0, (Evidence("because", name, AT),), "-")
    return nouns.Facts(
        format=nouns.FORMAT,
        kickcall="0.1.0",
        by="kickcall bundle",
        at=AT,
        took_s=2.5,
        machine=nouns.MachineFacts(
            name, 4711, "7.2.22", "running", 120.5, ("qemu-system-x86_64", "-name", name), 1
        ),
        host=nouns.HostFacts("Linux 6.1.0 x86_64", "Debian GNU/Linux 12 (bookworm)", 8),
        verdicts=(found if stalled else healthy,),
        devices=(
            nouns.DeviceFacts(
                *(path, name, "vhost-user-blk", "vhost-user", "split", 1, True, False, True),
                features=("VIRTIO_RING_F_EVENT_IDX",),
                refusal="",
                queues=(
                    nouns.QueueFacts(
                        fixed, state, Sample(AT, 2, 1, None, 0, 0, 1, 1, kick_count=0, call_count=0)
                    ),
                ),
            ),
        ),
        notifiers=(
            nouns.NotifierFacts(
                *(path, name, 0, DeviceEvent.KICK, 75, 22, 0, 0o2004002, None),
                holders=(Holder(71, name, 10),),
            ),
        ),
        backends=(nouns.ProcessFacts(71, name, ("backend", name)),),
        threads=(
            nouns.ThreadFacts(71, 71, name, "S", "epoll_wait", "ep_poll", ("ep_poll",), False),
        ),
        counts=(nouns.CountFacts(path, 0, DeviceEvent.KICK, 7, AT, name),),
        journal=({"at": AT, "device": path, "queue": 0, "what": name, "outcome": name},),
        missing=(nouns.Missing(name, name),),
    )


def lines(name: str = "vm0", *, count: int = 50) -> Iterator[nouns.Line]:
    """Yield what a film of that queue shows: the driver publishes one more, and nobody looks."""
    for look in range(count):
        published = 1 + (look > count // 2)
        yield nouns.Line(
            *(AT + look * 0.02, f"/machine/peripheral/{name}", 0),
            avail_idx=published,
            used_idx=1,
            last_avail_idx=None,
            avail_flags=0,
            used_flags=0,
            used_event=1,
            avail_event=1,
            kick_count=0,
            call_count=0,
        )
