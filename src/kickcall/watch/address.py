"""What does an address say: on which interface, on which port?"""

from __future__ import annotations

import contextlib
import ipaddress

from kickcall.errors import UsageError


def address_of(text: str) -> tuple[str, int]:
    """Return the address and port of `[ADDR:]PORT`; of a port alone, on the loopback interface.

    Raises UsageError where `text` is neither. Names are not looked up: what they mean changes.
    """
    host, _, port = text.rpartition(":")
    host = (host or "127.0.0.1").removeprefix("[").removesuffix("]")
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        if port.isascii() and port.isdecimal() and int(port) < 1 << 16:
            return host, int(port)
    raise UsageError(f"{text!r} is no address: write 9478, 127.0.0.1:9478 or [::1]:9478")
