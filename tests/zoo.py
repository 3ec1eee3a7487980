"""Which machine has every kind of device, and on which versions of QEMU is it tried?"""

from __future__ import annotations

import os

import pytest

from kickcall.lab.spec import (
    MachineSpec,
    VhostUserBlk,
    VirtioBlk,
    VirtioNet,
    VirtioScsi,
)

QEMUS = [
    pytest.param("system", id="system"),
    pytest.param(
        "trixie",
        id="trixie",
        marks=pytest.mark.skipif(os.geteuid() != 0, reason="a QEMU in its own root needs root"),
    ),
]
"""This system's QEMU (7.2 on Debian 12), and Debian 13's (10.0) in a root of its own."""

ZOO = (
    VirtioBlk(id="blk0", queues=2),
    VirtioBlk(id="iot0", queues=2, iothread=True),
    VirtioBlk(id="packed0", queues=2, packed=True, legacy="off"),
    VirtioBlk(id="packediot0", queues=2, packed=True, iothread=True, legacy="off"),
    VirtioBlk(id="slow0", queues=2, options=("ioeventfd=off",)),
    VirtioScsi(id="scsi0", queues=2),
    VirtioScsi(id="scsipk0", queues=2, packed=True, legacy="off"),
    VirtioNet(id="net0"),
    VhostUserBlk(id="vub0", queues=2, relay=True, disk="file"),
    VhostUserBlk(id="direct0", queues=2, relay=False, disk="file"),
)
"""Every kind of device, layout and back-end. `slow0` has no notifiers at all."""


def zoo_spec(qemu: str) -> MachineSpec:
    # Without IPv6 an idle guest sends nothing, so no interrupt comes that no test asked for.
    return MachineSpec(qemu=qemu, devices=ZOO, monitors=2, kernel_arguments="ipv6.disable=1")
