"""Watch a folder: python watch.py BUNDLE FOLDER writes photo.jpg's caption into photo.jpg.txt, until interrupted."""

import sys
import time
from pathlib import Path

from edgecap import Captioner
from edgecap.runtime import EdgecapError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
EVERY = 0.5  # seconds between two looks

bundle, folder = sys.argv[1], Path(sys.argv[2])
seen: dict[Path, tuple[int, int]] = {}  # photo → its size and time when we last looked
told: dict[Path, tuple[int, int]] = {}  # and when we last tried it

with Captioner.load(bundle) as captioner:
    print(f"watching {folder}", flush=True)
    while True:
        for photo in sorted(each for each in folder.iterdir() if each.suffix.lower() in SUFFIXES):
            try:
                status = photo.stat()
                now = (status.st_size, status.st_mtime_ns)
                if seen.get(photo) == now != told.get(photo):  # as it was at the last look: written to its end
                    told[photo] = now
                    text = Path(f"{photo}.txt")
                    if not text.exists() or text.stat().st_mtime_ns < status.st_mtime_ns:
                        text.write_text(f"{captioner(photo)}\n", encoding="utf-8")
                        print(f"{photo.name}\t{text.read_text(encoding='utf-8')}", end="", flush=True)
                seen[photo] = now
            except (EdgecapError, OSError) as error:  # broken, or gone again: the others wait
                print(f"{photo.name}\t{error}", file=sys.stderr, flush=True)
        time.sleep(EVERY)
