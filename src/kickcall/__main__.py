"""`python -m kickcall`: the command line, where the script is not on the PATH."""

import contextlib
from pathlib import Path

from kickcall.cli.main import run

# By its name others know whose duplicates of notifiers and whose writes these are.
with contextlib.suppress(OSError):
    Path("/proc/self/comm").write_text("kickcall")

run()
