"""Who may ask what? Checked before anything is answered.

- Only requests for hosts that are ours: a page of somebody else whose name was made to lead here
  (DNS rebinding) asks for that name.
- Whoever wants an event raised shows the token in a header, which no other site's page can send
  without asking first (CORS), and is never allowed to; and comes from a page of ours (Origin).
"""

from __future__ import annotations

import hmac
import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

TOKEN_HEADER = "x-kickcall-token"
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})

HEADERS: dict[str, str] = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
"""Said with every answer."""


@dataclass(frozen=True, slots=True)
class Guard:
    """What is allowed. `token` None: nothing is ever raised."""

    hosts: frozenset[str]
    """Names and addresses, as in a Host header, without a port."""
    token: str | None

    def refuse(self, headers: Mapping[str, str]) -> str:
        """Return why a request is not answered at all; empty where it is."""
        if host_of(headers.get("host", "")) not in self.hosts:
            return (
                "this is not a host that kickcall serves: use its own address, or start it with "
                "--host NAME"
            )
        return ""

    def refuse_event(self, headers: Mapping[str, str]) -> str:
        """Return why an event is not raised; empty where it may be."""
        if self.token is None:
            return "this page only reads: start kickcall serve with --allow-inject"
        origin = headers.get("origin", "")
        scheme, _, authority = origin.partition("://")
        if scheme not in ("http", "https") or authority != headers.get("host", ""):
            return "only a page of this kickcall serve may ask for that"
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return "only a page of this kickcall serve may ask for that"
        if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return "only JSON is taken"
        shown = headers.get(TOKEN_HEADER, "")
        if not hmac.compare_digest(shown.encode(), self.token.encode()):
            return "the token is not the one that kickcall serve printed"
        return ""


def host_of(authority: str) -> str:
    """Return the host of a Host header, without its port."""
    if authority.startswith("["):
        return authority[: authority.find("]") + 1].lower()
    return authority.partition(":")[0].lower()


def is_loopback(address: str) -> bool:
    """Tell whether an address to listen on is reached from this host alone."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return False


def hosts_of(address: str, names: tuple[str, ...]) -> frozenset[str]:
    """Return the hosts that are ours when that address is listened on."""
    own = f"[{address}]" if ":" in address else address
    ours = {name.lower() for name in names} | {own}
    return frozenset(ours | LOOPBACK if is_loopback(address) else ours)
