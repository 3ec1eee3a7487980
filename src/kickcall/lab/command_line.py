"""With which arguments does QEMU become a lab machine, and boot its guest?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kickcall.lab.board import BOARDS
from kickcall.lab.spec import FIRST_HOTPLUG_SLOT, VHOST_NET_PREFIX_LENGTH, E1000e, VhostNet

if TYPE_CHECKING:
    from kickcall.lab.image import GuestImage
    from kickcall.lab.spec import MachineSpec


def machine_arguments(spec: MachineSpec, folder: str) -> list[str]:
    """Return QEMU's arguments for a machine's name, memory, monitors and devices.

    `spec` is complete; `folder` is the machine's folder as QEMU sees it.
    """
    arguments = [
        *("-name", f"guest={spec.name},debug-threads=on"),
        *("-m", str(spec.memory_mib)),
        *("-smp", str(spec.cpus)),
        *("-nodefaults", "-no-user-config", "-display", "none"),
    ]
    if spec.memory_is_shared:
        arguments += [
            *("-object", f"memory-backend-memfd,id=ram,size={spec.memory_mib}M,share=on"),
            *("-M", f"{spec.board},memory-backend=ram"),
        ]
    else:
        arguments += ["-M", spec.board]
    for number in range(spec.monitors):
        arguments += ["-qmp", f"unix:{folder}/qmp{number},server=on,wait=off"]
    if spec.lab_monitor:
        arguments += [
            *("-chardev", f"socket,id=lab-monitor,path={folder}/lab-monitor,server=on,wait=off"),
            *("-mon", "chardev=lab-monitor,mode=control"),
        ]
    for number in range(spec.hotplug_ports):
        slot = FIRST_HOTPLUG_SLOT + number
        port = f"pcie-root-port,id=hot{number},chassis={number + 1},addr={slot:#x}"
        arguments += ["-device", port]
    for device in spec.devices:
        arguments += device.arguments(folder, spec.iothread_poll_ns)
    return arguments


def guest_arguments(spec: MachineSpec, folder: str, image: GuestImage, *, kvm: bool) -> list[str]:
    """Return QEMU's arguments that boot the guest and its agent's channel."""
    addresses = "".join(
        f" lab.address={device.mac},{device.guest_address}/{length}"
        for device in spec.devices
        for kind, length in ((VhostNet, VHOST_NET_PREFIX_LENGTH), (E1000e, 24))
        if isinstance(device, kind)
    )
    board = BOARDS[spec.board]
    return [
        *(("-accel", "kvm") if kvm else ("-accel", "tcg,thread=multi")),
        *("-cpu", "host" if kvm else board.cpu),
        *("-kernel", str(image.kernel), "-initrd", str(image.initramfs)),
        "-append",
        f"{board.kernel_words(kvm=kvm)}{addresses} {spec.kernel_arguments}".strip(),
        *("-chardev", f"file,id=lab-console,path={folder}/console.log,append=on"),
        *("-serial", "chardev:lab-console"),
        *("-chardev", f"socket,id=lab-agent,path={folder}/agent,server=on,wait=off"),
        *board.agent_port,
    ]
