"""Is it known who a thread is, from what it did, its process and its name?"""

from __future__ import annotations

import os
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from kickcall.model import DeviceEvent, Signaller
from kickcall.vmm.signallers import Signallers

if TYPE_CHECKING:
    from collections.abc import Iterator

KICK, CALL = DeviceEvent.KICK, DeviceEvent.CALL


def nobody() -> frozenset[int]:
    """Stand in for a monitor that does not tell which threads run the guest."""
    return frozenset()


@pytest.fixture
def other() -> Iterator[int]:
    """A process that is neither the VMM nor we."""
    process = subprocess.Popen(["sleep", "60"])
    yield process.pid
    process.kill()
    process.wait()


def who(
    signallers: Signallers, tid: int, comm: str, event: DeviceEvent, in_kernel: bool
) -> Signaller:
    signallers.thread(tid, comm)
    return signallers.who(tid, event, in_kernel=in_kernel)


def test_a_doorbell_rings_in_the_thread_of_a_virtual_cpu(other: int) -> None:
    # The name is whatever QEMU or libvirt gave it: the kernel's way is proof enough.
    vmm = Signallers(other, nobody)
    assert who(vmm, other, "qemu-system-x86", KICK, True) is Signaller.GUEST


def test_without_kvm_the_virtual_cpus_thread_writes(other: int) -> None:
    vmm = Signallers(other, lambda: frozenset({other}))
    assert who(vmm, other, "qemu-system-x86", KICK, False) is Signaller.GUEST
    by_name = Signallers(other, nobody)
    assert who(by_name, other, "CPU 3/TCG", KICK, False) is Signaller.GUEST


def test_a_virtual_cpu_that_calls_is_qemus_device_in_it(other: int) -> None:
    vmm = Signallers(other, lambda: frozenset({other}))
    assert who(vmm, other, "CPU 0/KVM", CALL, False) is Signaller.QEMU


def test_an_iothread_is_qemus(other: int) -> None:
    vmm = Signallers(other, lambda: frozenset({1}))
    assert who(vmm, other, "IO iot0", CALL, False) is Signaller.QEMU


def test_a_vhost_worker_is_known_by_its_name_and_by_being_the_kernels(other: int) -> None:
    # Linux up to 6.3: a kernel thread; since then a thread of the VMM.
    vmm = Signallers(4242, nobody)
    assert who(vmm, other, "vhost-4242", CALL, True) is Signaller.VHOST
    own = Signallers(other, nobody)
    assert who(own, other, f"vhost-{other}", CALL, True) is Signaller.VHOST
    # A process that only calls itself so writes, and is a process.
    assert who(vmm, other, "vhost-4242", CALL, False) is Signaller.PROCESS
    # Another machine's worker does not serve this one.
    assert who(vmm, other, "vhost-4243", CALL, True) is Signaller.KERNEL


def test_a_call_by_the_kernel_in_any_other_thread_is_the_kernels(other: int) -> None:
    vmm = Signallers(other, lambda: frozenset({other}))
    assert who(vmm, other, "CPU 0/KVM", CALL, True) is Signaller.KERNEL


def test_the_monitor_is_not_asked_where_the_kernel_has_told(other: int) -> None:
    def ask() -> frozenset[int]:
        raise AssertionError("asked")

    vmm = Signallers(other, ask)
    assert who(vmm, other, "qemu-system-x86", KICK, True) is Signaller.GUEST
    assert who(vmm, other, "qemu-system-x86", CALL, False) is Signaller.QEMU
    with pytest.raises(AssertionError, match="asked"):
        who(vmm, other, "qemu-system-x86", KICK, False)


def test_kickcall_is_known_by_its_name_or_by_being_this_process(other: int) -> None:
    vmm = Signallers(1, nobody)
    assert who(vmm, other, "kickcall", KICK, False) is Signaller.KICKCALL
    assert who(vmm, threading.get_native_id(), "python", KICK, False) is Signaller.KICKCALL


def test_a_back_end_is_a_process_with_its_pid(other: int) -> None:
    vmm = Signallers(os.getpid(), nobody)
    assert who(vmm, other, "qemu-storage-da", CALL, False) is Signaller.PROCESS
    assert vmm.thread(other) == (other, "qemu-storage-da")


def test_a_thread_that_has_ended_keeps_what_was_known_of_it() -> None:
    process = subprocess.Popen(["sleep", "60"])
    vmm = Signallers(1, nobody)
    vmm.thread(process.pid, "sleep")
    process.kill()
    process.wait()
    assert vmm.thread(process.pid, "sleep") == (process.pid, "sleep")
    unseen = Signallers(1, nobody)
    assert unseen.thread(process.pid, "sleep") == (None, "sleep")
    assert unseen.who(process.pid, CALL, in_kernel=False) is Signaller.PROCESS


def test_in_a_pid_namespace_of_its_own_nobody_is_guessed(other: int) -> None:
    vmm = Signallers(other, lambda: frozenset({other}), ids_are_ours=False)
    assert who(vmm, other, "CPU 0/KVM", KICK, True) is Signaller.UNKNOWN
    assert vmm.thread(other).pid is None
