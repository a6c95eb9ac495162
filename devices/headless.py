"""A browser without a window, started here: a bench in a page that needs no phone, for tests and for figures that
others can repeat.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from ..runtime.errors import UsageError
from .group import kill_group

# Ends the browser when we are gone, however that came: our end of its standard input closes then.
WATCH = """
exec 3<&0
"$@" </dev/null 3<&- & browser=$!
(cat <&3 >/dev/null; kill $browser) & watch=$!
wait $browser; code=$?
kill $watch
exit $code
"""


class Headless:
    """One headless Chromium with a profile of its own. close() ends it and everything it started."""

    def __init__(self, program: str, url: str, *, spki: str | None = None, flags: tuple[str, ...] = ()) -> None:
        """Open `url`. spki: of the one certificate that it accepts unasked. UsageError where there is none."""
        found = shutil.which(program)
        if found is None:
            raise UsageError(f"there is no program {program} to open the page with")
        self._profile = tempfile.TemporaryDirectory(prefix="edgecap-browser-", ignore_cleanup_errors=True)
        command = [
            found,
            "--headless=new",
            f"--user-data-dir={self._profile.name}",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-dev-shm-usage",
            "--enable-blink-features=ForceEagerMeasureMemory",  # or a figure takes up to 20 s
            *([f"--ignore-certificate-errors-spki-list={spki}"] if spki else []),
            *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []),  # Chromium's rule for root
            *flags,
            url,
        ]
        self._log = (Path(self._profile.name) / "log").open("wb")
        if hasattr(os, "killpg"):
            command = ["sh", "-c", WATCH, "sh", *command]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self._log, stderr=self._log, start_new_session=True
        )

    @property
    def ended(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    @property
    def said(self) -> str:
        """The last line that it printed."""
        lines = Path(self._log.name).read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")

    def close(self) -> None:
        if self._process.poll() is None:
            kill_group(self._process, signal.SIGTERM)
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                pass
        if hasattr(os, "killpg"):
            kill_group(self._process)  # what it started, too
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._log.close()
        self._profile.cleanup()
