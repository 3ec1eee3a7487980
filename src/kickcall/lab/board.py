"""Which boards can a lab machine be built on, and what does each need of QEMU and of Linux?"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

BoardName = Literal["q35", "microvm", "virt"]
Architecture = Literal["amd64", "arm64"]
"""Debian's name of what runs on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """A machine type of QEMU: `-M`."""

    name: BoardName
    program: str = "qemu-system-x86_64"
    package: str = "qemu-system-x86"
    """The Debian package that brings the program."""
    architecture: Architecture = "amd64"
    cpu: str = "max"
    """What TCG emulates."""
    console: str = "ttyS0"
    agent: str = "ttyS1"
    """The guest's name of the serial port of the lab's agent."""
    agent_port: tuple[str, ...] = ("-serial", "chardev:lab-agent")
    mmio_base: int = 0
    """Where the registers of its first virtio-mmio transport are; 0 where it has none."""
    has_pci: bool = True
    kernel_arguments: str = ""

    def kernel_words(self, *, kvm: bool) -> str:
        """Return what the kernel's command line has to say on this board."""
        words = [f"console={self.console}", f"lab.agent={self.agent}", self.kernel_arguments]
        words.append("quiet panic=-1 tsc=reliable")
        if self.architecture == "amd64" and not kvm:
            # Linux panics where its clock did not tick for 60 ms, as where this host is busy
            # (arch/x86/kernel/apic/io_apic.c, timer_irq_works). Under KVM it does not look.
            words += ["no_timer_check", tsc_words()]
        return " ".join(filter(None, words))

    def mmio_address(self, slot: int) -> int:
        """Return the guest-physical address of the registers of virtio-mmio transport `slot`."""
        return self.mmio_base + slot * 0x200


BOARDS: Final[dict[str, Board]] = {
    board.name: board
    for board in (
        Board(name="q35"),
        # hw/i386/microvm.c, include/hw/i386/microvm.h: VIRTIO_MMIO_BASE; one serial port of its own
        Board(
            name="microvm",
            agent_port=("-device", "isa-serial,chardev=lab-agent"),
            mmio_base=0xFEB00000,
            has_pci=False,
            # Linux 6.1 with KASLR stops there under TCG in one boot of five, before its first word.
            kernel_arguments="nokaslr",
        ),
        # hw/arm/virt.c: base_memmap[VIRT_MMIO]; its one UART is the console's
        Board(
            name="virt",
            program="qemu-system-aarch64",
            package="qemu-system-arm",
            architecture="arm64",
            cpu="cortex-a57",
            console="ttyAMA0",
            agent="ttyS0",
            agent_port=("-device", "pci-serial,chardev=lab-agent,addr=0x1f"),
            mmio_base=0x0A000000,
        ),
    )
}


def tsc_words() -> str:
    """Return what tells Linux under TCG how fast its TSC is, or nothing where it is not known.

    It is this host's TSC. Linux measures it as it boots, by clocks that TCG emulates, and where
    the host is busy it may be wrong by a factor of ten, and stay so.
    """
    if Path("/sys/devices/system/cpu/cpu0/cpufreq").exists():
        return ""  # then /proc/cpuinfo tells how fast the processor is at the moment
    mhz = re.search(r"^cpu MHz\s*: ([0-9.]+)$", Path("/proc/cpuinfo").read_text(), re.M)
    return f"tsc_early_khz={float(mhz[1]) * 1000:.0f}" if mhz else ""
