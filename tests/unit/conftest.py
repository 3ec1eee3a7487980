"""How long may an example of a property take? As long as it likes: the host may be busy."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("busy", deadline=None)
settings.load_profile("busy")
