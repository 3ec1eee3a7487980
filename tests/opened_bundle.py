"""What is in a bundle? Read with nothing of kickcall's but the types of its facts."""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kickcall.incident.facts import facts_from, lines_from

if TYPE_CHECKING:
    from pathlib import Path

    from kickcall.incident.facts import Facts, Line


@dataclass
class Opened:
    """A bundle, opened."""

    told: dict[str, Any]
    names: list[str]
    members: dict[str, bytes]
    facts: Facts

    def lines(self) -> list[Line]:
        return lines_from(self.members["samples.jsonl"])


def opened(path: Path, told: str) -> Opened:
    """Open a bundle. `told` is what the command that wrote it printed, as JSON."""
    with tarfile.open(path) as file:
        entries = file.getmembers()
        members = {}
        for entry in entries:
            content = file.extractfile(entry)
            assert content is not None
            members[entry.name.partition("/")[2]] = content.read()
    names = [entry.name.partition("/")[2] for entry in entries]
    return Opened(json.loads(told), names, members, facts_from(members["facts.json"]))
