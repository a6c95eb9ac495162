"""A process's own peak memory. Imports nothing that costs, because what it imports it also measures.

Run as a script it imports the modules named, then prints its peak: the idle interpreter when none is named.
"""

from __future__ import annotations

import sys


def peak_rss() -> int | None:
    """The most memory (bytes, resident) this process ever held; None where the system does not tell.

    Linux: VmHWM, and not getrusage's ru_maxrss, which a process inherits from the one that started it.
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    for name in sys.argv[1:]:
        __import__(name)
    print(f'{{"ok": true, "peak_rss": {peak_rss() or "null"}}}', flush=True)
