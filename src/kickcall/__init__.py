"""kickcall: find and repair lost virtio notifications on running, unmodified virtual machines.

>>> import kickcall
>>> with kickcall.attach("vm0") as machine:                       # doctest: +SKIP
...     result = machine.device("vscsi0").queue(3).kick()
...     print(result.via, result.before, result.after)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kickcall.errors import KickcallError
from kickcall.model import DeviceEvent, Via

if TYPE_CHECKING:
    from kickcall.attached import attach

__version__ = "0.1.0"
__all__ = ["DeviceEvent", "KickcallError", "Via", "__version__", "attach"]


def __getattr__(name: str) -> object:
    """Load `attach` and all that it needs only when it is used: the command line starts fast.

    No submodule may be called `attach`: importing it would put the module in the function's place.
    """
    if name == "attach":
        from kickcall.attached import attach

        return attach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
