"""Is each interrupt line of a guest given to the right device? (text of a real guest, 6.1)"""

from __future__ import annotations

from kickcall.lab.interrupts import parse_disks, parse_interrupts

LISTING = """\
           CPU0       CPU1
  0:         74          0   IO-APIC   2-edge      timer
 11:          5          0   IO-APIC  11-fasteoi   uhci_hcd:usb1, virtio7
 24:          0          0   PCI-MSI 32768-edge      virtio1-config
 25:          3          4   PCI-MSI 32769-edge      virtio1-req.0
 26:          0          1   PCI-MSI 32770-edge      virtio1-req.1
 31:          9          9   PCI-MSI 114688-edge      virtio11-config
 33:          0          0   PCI-MSI 81920-edge      virtio3-config
 34:          0          0   PCI-MSI 81921-edge      virtio3-control
 35:          0          0   PCI-MSI 81922-edge      virtio3-event
 36:        273          0   PCI-MSI 81923-edge      virtio3-request
 37:          0         13   PCI-MSI 81924-edge      virtio3-request
NMI:          0          0   Non-maskable interrupts
total 0
lrwxrwxrwx 1 0 0 0 Nov 22 virtio1 -> ../../../devices/pci0000:00/0000:00:02.0/virtio1
lrwxrwxrwx 1 0 0 0 Nov 22 virtio11 -> ../../../devices/pci0000:00/0000:00:0c.0/virtio11
lrwxrwxrwx 1 0 0 0 Nov 22 virtio3 -> ../../../devices/pci0000:00/0000:00:05.0/virtio3
lrwxrwxrwx 1 0 0 0 Nov 22 virtio7 -> ../../../devices/pci0000:00/0000:00:18.0/0000:01:00.0/virtio7
"""


def test_counts_are_summed_over_cpus_and_named_as_the_driver_names_them() -> None:
    assert parse_interrupts(LISTING, "0000:00:02.0") == {"config": 0, "req.0": 7, "req.1": 1}


def test_names_that_repeat_are_numbered_in_the_order_of_the_queues() -> None:
    assert parse_interrupts(LISTING, "0000:00:05.0") == {
        "config": 0,
        "control": 0,
        "event": 0,
        "request.0": 273,
        "request.1": 13,
    }


def test_a_shared_intx_line_of_a_device_behind_a_port_is_found() -> None:
    assert parse_interrupts(LISTING, "0000:00:18.0") == {"intx": 5}


def test_a_device_that_the_guest_does_not_have_has_no_interrupts() -> None:
    assert parse_interrupts(LISTING, "0000:00:09.0") == {}


def test_disks_are_found_by_the_pci_device_behind_which_they_are() -> None:
    listing = """\
lrwxrwxrwx 1 0 0 0 sda -> ../devices/pci0000:00/0000:00:05.0/virtio3/host0/target0:0:0/0:0:0:0/block/sda
lrwxrwxrwx 1 0 0 0 vda -> ../devices/pci0000:00/0000:00:02.0/virtio0/block/vda
lrwxrwxrwx 1 0 0 0 vdb -> ../devices/pci0000:00/0000:00:18.0/0000:01:00.0/virtio7/block/vdb
"""  # noqa: E501 (a real line)
    assert parse_disks(listing, "0000:00:05.0") == ["sda"]
    assert parse_disks(listing, "0000:00:02.0") == ["vda"]
    assert parse_disks(listing, "0000:00:18.0") == ["vdb"]
    assert parse_disks(listing, "0000:00:09.0") == []
