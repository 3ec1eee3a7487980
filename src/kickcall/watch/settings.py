"""How are machines watched: how often, and when is a queue that stands still worth a word?"""

from __future__ import annotations

from dataclasses import dataclass, field

from kickcall.diagnose.states import Thresholds


@dataclass(frozen=True, slots=True)
class Settings:
    """How machines are watched. Seconds."""

    interval_s: float = 0.1
    """Between two looks while nothing hesitates."""
    limits: Thresholds = field(default_factory=lambda: Thresholds(notification_s=0.15))
    """Whoever stands still for so long is looked at more closely, and healed if the facts agree."""
    report_s: float = 0.5
    """A stall that is not healed is told after so long: `kickcall diagnose` waits as long."""
