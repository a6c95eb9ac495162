"""Caption photos: python script.py BUNDLE PHOTO..."""

import sys

from edgecap import Captioner
from edgecap.runtime import EdgecapError

if len(sys.argv) < 3:
    sys.exit(__doc__)
bundle, *photos = sys.argv[1:]
failed = False
try:
    captioner = Captioner.load(bundle)
except EdgecapError as error:  # no such bundle, or not one to trust
    sys.exit(error.message)
with captioner:
    for photo in photos:
        try:
            for piece in captioner.stream(photo):  # as it is said; captioner(photo) gives it all at once
                print(piece, end="", flush=True)
            print()
        except EdgecapError as error:  # broken, missing, or no photo at all: one line, and on with the next
            print(error.message, file=sys.stderr)
            failed = True
sys.exit(1 if failed else 0)
