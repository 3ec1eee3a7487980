"""Where does the running kernel signal an eventfd, and how is the eventfd's id found there?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kickcall.host.btf import Kind, kernel_types

IN_KERNEL: Final = "signal"
"""Somebody signalled from within the kernel: KVM's ioeventfd, vhost, an interrupt."""
BY_WRITE: Final = "write"
"""A process wrote to the eventfd: write(2) and its kin."""


@dataclass(frozen=True, slots=True)
class Site:
    """A function of the kernel."""

    function: str
    number: int | None
    """Of the function in the kernel's BTF; None where that does not tell of it."""


@dataclass(frozen=True, slots=True)
class Sites:
    """The functions by what a call of them means, and where the id is in what they are given."""

    functions: dict[str, Site]
    """IN_KERNEL: its first parameter is a `struct eventfd_ctx *`; BY_WRITE: a `struct file *`."""
    id_offset: int
    """Of `id` in struct eventfd_ctx."""
    private_offset: int
    """Of `private_data`, the eventfd_ctx, in struct file."""


def signal_sites() -> Sites:
    """Return the sites of the running kernel, by its BTF. Raises KernelViewError."""
    types = kernel_types()

    def site(name: str) -> Site:
        found = types.find(name, (Kind.FUNC,))
        return Site(name, None if found is None else found.id)

    # Linux 6.8 (120ae5859363, "eventfd: make eventfd_signal{_mask}() void") made eventfd_signal an
    # inline function around eventfd_signal_mask(ctx, mask). Before, eventfd_signal is a function,
    # eventfd_signal_mask took (ctx, n, mask) and was io_uring's alone (03e02acda8e2, Linux 6.2 and
    # stable kernels), or was not there: to probe both would count twice.
    mask = types.find("eventfd_signal_mask", (Kind.FUNC,))
    inline = mask is not None and mask.parameters == 2
    return Sites(
        {
            IN_KERNEL: site("eventfd_signal_mask" if inline else "eventfd_signal"),
            BY_WRITE: site("eventfd_write"),  # (struct file *, …): fs/eventfd.c
        },
        types.struct("eventfd_ctx").member("id").offset,
        types.struct("file").member("private_data").offset,
    )
