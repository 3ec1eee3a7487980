"""`kickcall top` over recorded machines: what bench/test_live_views.py measures, on a terminal.

python bench/recorded_top.py MACHINES QUEUES SECONDS_BETWEEN_DRAWINGS
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from kickcall.top.app import Top
from recorded import Recorded

PACE_S = 0.5
"""How often so many machines are looked at (kickcall.watch.feed)."""


def play(source: Recorded) -> None:
    """Let the machines move for as long as the process runs."""
    while True:
        source.play(time.monotonic())
        time.sleep(PACE_S)


def main() -> None:
    """Draw until the process is ended."""
    machines, queues, every_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    source = Recorded(machines, queues)
    for number in range(0, machines, 20):
        source.recorded[number].stall(queues - 1, source.now)
    threading.Thread(target=play, args=(source,), daemon=True).start()
    Top(source, every_s=every_s).run()


if __name__ == "__main__":
    main()
