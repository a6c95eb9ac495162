"""Processes that lead a session of their own are ended with everything that they started."""

from __future__ import annotations

import os
import signal
import subprocess

NOW = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has but the second


def kill_group(process: subprocess.Popen[bytes], how: signal.Signals = NOW) -> None:
    """Send a signal to a process that leads a session, and to everything in its group: by default they end now."""
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, how)
        else:
            process.send_signal(how)
    except (ProcessLookupError, PermissionError):
        pass
