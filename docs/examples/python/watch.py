"""Watch a folder: python watch.py BUNDLE FOLDER writes photo.jpg's caption into photo.jpg.txt, until interrupted."""

import sys
import time
from pathlib import Path

from edgecap import Captioner
from edgecap.runtime import EdgecapError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
EVERY = 0.5  # seconds between two looks

if len(sys.argv) != 3:
    sys.exit(__doc__)
bundle, folder = sys.argv[1], Path(sys.argv[2])
seen: dict[Path, tuple[int, int]] = {}  # photo → its size and time when we last looked
told: dict[Path, tuple[int, int]] = {}  # and when we last tried it


def look(captioner: Captioner) -> None:
    for photo in sorted(each for each in folder.iterdir() if each.suffix.lower() in SUFFIXES):
        try:
            status = photo.stat()
            changed = max(status.st_mtime_ns, status.st_ctime_ns)  # an older photo that is moved here is new here
            now = (status.st_size, changed)
            if seen.get(photo) == now != told.get(photo):  # as it was at the last look: written to its end
                told[photo] = now
                text = Path(f"{photo}.txt")
                if not text.exists() or text.stat().st_mtime_ns < changed:
                    caption = captioner(photo)
                    text.write_text(f"{caption}\n", encoding="utf-8")
                    print(f"{photo.name}\t{caption}", flush=True)
            seen[photo] = now
        except (EdgecapError, OSError) as error:  # broken, or gone again: the others wait
            print(f"{photo.name}\t{error}", file=sys.stderr, flush=True)


sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names need not be UTF-8
try:
    with Captioner.load(bundle) as captioner:
        print(f"watching {folder}", flush=True)
        while True:
            look(captioner)
            time.sleep(EVERY)
except (EdgecapError, OSError) as error:  # no such bundle; the folder is gone
    sys.exit(str(error))
except KeyboardInterrupt:
    pass
