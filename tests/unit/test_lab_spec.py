"""Does a lab machine's description become the QEMU command line that it means?"""

from __future__ import annotations

from pathlib import Path

import pytest

from kickcall.errors import LabError
from kickcall.lab.command_line import guest_arguments, machine_arguments
from kickcall.lab.image import GuestImage
from kickcall.lab.spec import (
    AnyDevice,
    MachineSpec,
    OtherDevice,
    VhostNet,
    VhostScsi,
    VhostUserBlk,
    VhostVsock,
    VirtioBlk,
    VirtioNet,
    VirtioScsi,
)
from kickcall.lab.spec_text import parse_board, parse_device
from kickcall.lab.vhost_kernel import named


def arguments(*devices: AnyDevice) -> list[str]:
    return machine_arguments(MachineSpec(name="vm0", devices=devices).complete(), "/f")


def test_devices_get_ids_and_slots_in_order_around_those_that_are_given() -> None:
    spec = MachineSpec(
        devices=(VirtioBlk(), VirtioBlk(id="blk0", slot=3), VirtioBlk(), VirtioScsi())
    ).complete()
    assert [(device.id, device.slot) for device in spec.devices] == [
        ("blk1", 2),
        ("blk0", 3),
        ("blk2", 4),
        ("scsi0", 5),
    ]


@pytest.mark.parametrize(
    ("devices", "complaint"),
    [
        ((VirtioBlk(id="a"), VirtioNet(id="a")), "same id: a"),
        ((VirtioBlk(slot=5), VirtioNet(slot=5)), "same slot: 0x5"),
        ((VirtioBlk(),) * 23, "room for 22"),
    ],
)
def test_devices_that_cannot_be_together_are_refused(
    devices: tuple[VirtioBlk | VirtioNet, ...], complaint: str
) -> None:
    with pytest.raises(LabError, match=complaint):
        MachineSpec(devices=devices).complete()


def test_a_device_with_an_iothread_has_one_of_its_own_that_does_not_poll() -> None:
    command = arguments(VirtioBlk(iothread=True, queues=2))
    assert "iothread,id=blk0-iothread,poll-max-ns=0" in command
    assert (
        "virtio-blk-pci,id=blk0,addr=0x2,drive=blk0-disk,num-queues=2,iothread=blk0-iothread"
        in command
    )


@pytest.mark.parametrize(
    ("device", "properties"),
    [
        (VirtioNet(packed=True, legacy="off"), "packed=on,disable-legacy=on"),
        (VirtioNet(legacy="only"), "disable-modern=on,disable-legacy=off"),
        (VirtioNet(event_idx=False, options=("vectors=0",)), "event_idx=off,vectors=0"),
    ],
)
def test_layout_interface_and_raw_properties_reach_qemu(device: VirtioNet, properties: str) -> None:
    line = arguments(device)[-1]
    assert line.startswith("virtio-net-pci,")
    assert line.endswith("," + properties)


def test_memory_is_shared_exactly_when_a_vhost_user_device_needs_it() -> None:
    assert not any("memfd" in word for word in arguments(VirtioBlk()))
    shared = arguments(VirtioBlk(), VhostUserBlk())
    assert "memory-backend-memfd,id=ram,size=256M,share=on" in shared
    assert "q35,memory-backend=ram" in shared


def test_qemu_connects_to_the_relay_or_to_the_back_end_itself() -> None:
    assert "socket,id=vub0-socket,path=/f/vub0.relay" in arguments(VhostUserBlk())
    direct = arguments(VhostUserBlk(relay=False))
    assert "socket,id=vub0-socket,path=/f/vub0.backend" in direct


def test_vhost_in_the_kernel_gets_its_target_its_tap_and_its_address() -> None:
    command = arguments(
        VhostScsi(queues=2, wwpn="naa.5001405000000001"),
        VhostNet(queues=2, tap="kcl0", address="10.128.0.1", event_idx=False),
        VhostVsock(guest_cid=42),
    )
    assert "vhost-scsi-pci,id=vscsi0,addr=0x2,wwpn=naa.5001405000000001,num_queues=2" in command
    assert "tap,id=vnet0-tap,ifname=kcl0,script=no,downscript=no,vhost=on,queues=2" in command
    # Two vectors for each pair of queues, one for the control queue, one for configuration.
    assert (
        "virtio-net-pci,id=vnet0,addr=0x3,netdev=vnet0-tap,romfile=,mac=52:54:00:6b:63:03,"
        "mq=on,vectors=6,event_idx=off" in command
    )
    assert "vhost-vsock-pci,id=vsock0,addr=0x4,guest-cid=42" in command


def test_a_guest_is_told_its_address_on_each_tap() -> None:
    spec = MachineSpec(devices=(VhostNet(tap="kcl0", address="10.128.0.5"),)).complete()
    image = GuestImage(Path("/vmlinuz"), Path("/initramfs"))
    command = guest_arguments(spec, "/f", image, kvm=True)
    told = command[command.index("-append") + 1].split()
    assert "lab.address=52:54:00:6b:63:02,10.128.0.6/30" in told


def test_names_are_made_up_where_none_were_given_and_differ() -> None:
    given = (
        VhostScsi(wwpn="naa.1"),
        VhostNet(tap="t", address="10.0.0.1"),
        VhostVsock(guest_cid=3),
    )
    assert named(MachineSpec(devices=given)).devices == given
    left_out = MachineSpec(devices=(VhostScsi(), VhostNet(), VhostVsock(), VirtioBlk()))
    first, second = named(left_out).devices, named(left_out).devices
    assert len({*first, *second}) == 7
    scsi, net, vsock, _ = first
    assert isinstance(scsi, VhostScsi)
    assert len(scsi.wwpn) == len("naa.") + 16  # NAA 5: 64 bits
    assert isinstance(net, VhostNet)
    assert len(net.tap) <= 15  # linux/if.h: IFNAMSIZ with its NUL
    assert isinstance(vsock, VhostVsock)
    assert 3 <= vsock.guest_cid < 0xFFFFFFFF


def test_the_users_monitors_come_before_the_labs_own() -> None:
    command = machine_arguments(MachineSpec(name="vm0", monitors=2).complete(), "/f")
    users = [command[at + 1] for at, word in enumerate(command) if word == "-qmp"]
    assert users == ["unix:/f/qmp0,server=on,wait=off", "unix:/f/qmp1,server=on,wait=off"]
    assert command.index("-mon") > command.index(users[1])
    alone = machine_arguments(MachineSpec(name="vm0", lab_monitor=False).complete(), "/f")
    assert "-mon" not in alone


def test_a_device_is_written_as_its_kind_and_settings() -> None:
    assert parse_device("virtio-blk,iothread=on,packed=on,queues=2") == VirtioBlk(
        iothread=True, packed=True, queues=2
    )
    assert parse_device("vhost-user-blk,relay=off,disk=file,id=d0") == VhostUserBlk(
        relay=False, disk="file", id="d0"
    )
    assert parse_device("virtio-scsi,legacy=only,event-idx=off") == VirtioScsi(
        legacy="only", event_idx=False
    )


def test_a_device_of_vhost_in_the_kernel_is_written_like_the_others() -> None:
    assert parse_device("vhost-scsi,queues=2,size-mib=8") == VhostScsi(queues=2, size_mib=8)
    assert parse_device("vhost-net,queues=2,event-idx=off") == VhostNet(queues=2, event_idx=False)
    assert parse_device("vhost-vsock,guest-cid=42") == VhostVsock(guest_cid=42)


def test_what_the_lab_does_not_know_is_left_to_qemu() -> None:
    assert parse_device("virtio-net,vectors=0") == VirtioNet(options=("vectors=0",))
    assert parse_device("virtio-rng-pci,max-bytes=1") == OtherDevice(
        driver="virtio-rng-pci", options=("max-bytes=1",)
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("virtio-blk,packed=maybe", "must be on or off, not 'maybe'"),
        ("virtio-blk,queues=two", "must be a number, not 'two'"),
        ("virtio-blk,legacy=never", "must be auto, off or only, not 'never'"),
        ("virtio-blk,packed", "'packed' .* is not NAME=VALUE"),
        ("queues=2", "starts with its kind"),
        ("", "starts with its kind"),
    ],
)
def test_a_device_that_makes_no_sense_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(LabError, match=complaint):
        parse_device(text)


def test_on_a_board_without_pci_every_device_is_on_virtio_mmio() -> None:
    devices = (VirtioBlk(queues=2, packed=True), VirtioNet(legacy="off"))
    spec = MachineSpec(name="vm0", board="microvm", devices=devices).complete()
    command = machine_arguments(spec, "/f")
    assert command[command.index("-M") + 1] == "microvm"
    assert (
        "virtio-blk-device,id=blk0,bus=virtio-mmio-bus.2,drive=blk0-disk,num-queues=2,packed=on"
        in command
    )
    assert "virtio-net-device,id=net0,bus=virtio-mmio-bus.3,netdev=net0-user" in command


def test_an_aarch64_board_has_both_transports() -> None:
    devices = (VirtioBlk(mmio=True), VirtioBlk())
    spec = MachineSpec(name="vm0", board="virt", devices=devices).complete()
    drivers = [word.split(",")[0] for word in machine_arguments(spec, "/f") if "id=blk" in word]
    assert drivers == ["virtio-blk-device", "virtio-blk-pci"]
    image = GuestImage(Path("/vmlinuz"), Path("/initramfs"))
    command = guest_arguments(spec, "/f", image, kvm=False)
    told = command[command.index("-append") + 1].split()
    assert told[:2] == ["console=ttyAMA0", "lab.agent=ttyS0"]
    assert command[command.index("-cpu") + 1] == "cortex-a57"


def test_a_board_that_is_not_there_or_lacks_the_transport_is_refused() -> None:
    with pytest.raises(LabError, match="no virtio-mmio: take microvm or virt"):
        MachineSpec(devices=(VirtioBlk(mmio=True),)).complete()
    with pytest.raises(LabError, match="no board 'pc': take q35, microvm, virt"):
        parse_board("pc")
