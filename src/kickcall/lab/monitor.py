"""How does the lab ask one of its own machines something over QMP?

Short on purpose, and independent of kickcall's own client: the lab is what that one is tested on.
"""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

from kickcall.errors import LabError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def ask(
    path: Path, command: str, arguments: Mapping[str, Any] | None = None, timeout: float = 10.0
) -> Any:
    """Connect to a QMP socket, run one command, leave, and return what QEMU returned.

    Raises LabError with QEMU's own words for an error, or if the socket is silent.
    """
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            connection.connect(str(path))
            with connection.makefile("rw") as lines:
                lines.readline()
                _execute(lines, "qmp_capabilities", {})
                return _execute(lines, command, dict(arguments or {}))
    except OSError as error:
        raise LabError(f"the lab's monitor {path} does not answer {command}: {error}") from error


def _execute(lines: Any, command: str, arguments: dict[str, Any]) -> Any:
    lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
    lines.flush()
    while line := lines.readline():
        message = json.loads(line)
        if "error" in message:
            raise LabError(f"QEMU refused {command}: {message['error']['desc']}")
        if "return" in message:
            return message["return"]
    raise LabError(f"QEMU closed the lab's monitor while it was asked {command}")
