"""What a phone beside this machine needs to find it: the addresses on the LAN, and a code to point a camera at."""

from __future__ import annotations

import io
import socket


def lan_addresses() -> list[str]:
    """This machine's IPv4 addresses that others may reach, the one of the default route first; loopback alone is []."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address for documentation (RFC 5737); UDP's connect sends nothing
            found.append(probe.getsockname()[0])
        except OSError:
            pass
    try:
        found += [info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    except OSError:
        pass
    return [address for address in dict.fromkeys(map(str, found)) if not address.startswith(("127.", "0."))]


def qr_code(text: str) -> str | None:
    """`text` as a QR code of half blocks for a terminal; None without the package `segno`."""
    try:
        import segno
    except ImportError:
        return None
    lines = io.StringIO()
    segno.make(text, error="l", micro=False).terminal(lines, border=2, compact=True)
    return lines.getvalue()
