"""What does a vhost-user message say? (QEMU, docs/interop/vhost-user.rst)

Pure: bytes in, values out. The relay forwards most messages unread; it needs the few below.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

HEADER = struct.Struct("<III")
"""request, flags, size of the payload"""
LARGEST_PAYLOAD = 1 << 20
"""Far above any message of the protocol: a larger size means that we lost our place."""
MOST_FDS = 64
"""Room for file descriptors of one message; SET_MEM_TABLE has up to 8, or 1 per ADD_MEM_REG."""

_REPLY = 1 << 2
_VRING_INDEX = 0xFF
_VRING_NO_FD = 1 << 8


class Request(enum.IntEnum):
    """The front-end's requests that concern notifications."""

    RESET_OWNER = 4
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13


class Notification(enum.StrEnum):
    KICK = "kick"
    CALL = "call"


@dataclass(frozen=True, slots=True)
class Header:
    request: int
    flags: int
    size: int

    @property
    def is_reply(self) -> bool:
        return bool(self.flags & _REPLY)


@dataclass(frozen=True, slots=True)
class SetNotifier:
    """SET_VRING_KICK or SET_VRING_CALL: a queue gets the eventfd that comes with the message."""

    notification: Notification
    queue: int
    has_fd: bool
    """False: the queue is polled instead, and no fd comes."""


@dataclass(frozen=True, slots=True)
class StopQueue:
    """GET_VRING_BASE: the back-end stops the queue and tells how far it came."""

    queue: int


def parse_header(data: bytes) -> Header:
    """Return a message's header. Raises ValueError for what can be none."""
    header = Header(*HEADER.unpack(data))
    if header.size > LARGEST_PAYLOAD:
        raise ValueError(f"vhost-user message {header.request} claims {header.size} bytes")
    return header


def parse_request(header: Header, payload: bytes) -> SetNotifier | StopQueue | None:
    """Return what a front-end's message means for notifications, or None if nothing.

    Raises ValueError for a payload that is too short.
    """
    if header.is_reply:
        return None
    match header.request:
        case Request.SET_VRING_KICK | Request.SET_VRING_CALL:
            (value,) = _unpack("<Q", header, payload)
            kick = header.request == Request.SET_VRING_KICK
            return SetNotifier(
                Notification.KICK if kick else Notification.CALL,
                value & _VRING_INDEX,
                not value & _VRING_NO_FD,
            )
        case Request.GET_VRING_BASE:
            queue, _ = _unpack("<II", header, payload)
            return StopQueue(queue)
    return None


def _unpack(layout: str, header: Header, payload: bytes) -> tuple[int, ...]:
    if len(payload) < struct.calcsize(layout):
        raise ValueError(f"vhost-user message {header.request} has only {len(payload)} bytes")
    return struct.unpack_from(layout, payload)
