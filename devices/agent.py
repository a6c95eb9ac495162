"""What ssh runs on a device before edgecap is there: this file's own text, given to its Python by `-c`.

Standard library alone. Arguments: an operation and the cache folder. Answers one JSON object: {"ok": true, …}, or
{"ok": false, "error": one line}. Everything in the cache is named by the hash of its contents and moved into place when
it is whole: what is there is right, and need not be sent again.
"""

import errno
import glob
import json
import os
import platform
import shutil
import struct
import sys
import tarfile
import tempfile
import time
import zipfile

DAYS = 30  # that something is kept which no bench asks for


def probe(cache):
    """What decides whether and how edgecap can run here."""
    os.makedirs(cache, exist_ok=True)
    libc, version = platform.libc_ver()
    return {
        "cache": cache,
        "system": platform.system(),
        "machine": platform.machine(),
        "bits": 8 * struct.calcsize("P"),  # a 64-bit kernel may have a 32-bit system above it
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "glibc": version if libc == "glibc" else "",
        "free": shutil.disk_usage(cache).free,
    }


def have(cache):
    """Which of the names on stdin (a JSON list) are there; others that nobody asked for in DAYS days are deleted."""
    names = json.load(sys.stdin)
    for name in names:
        try:
            os.utime(os.path.join(cache, name))
        except OSError:
            pass  # not there
    forget(cache, time.time() - 86400 * DAYS)
    return {"have": [name for name in names if os.path.exists(os.path.join(cache, name))]}


def forget(cache, before):
    """Delete what was last asked for, or begun, before a time (s since 1970)."""
    places = [os.path.join(cache, kind, "*") for kind in ("sites", "bundles", "photos")]
    for place in [*places, os.path.join(cache, ".part-*")]:
        for path in glob.glob(place):
            try:
                if os.stat(path).st_mtime < before:
                    shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
            except OSError:
                pass  # another bench was first


def receive(cache):
    """Unpack the tar on stdin. Its names begin with two parts, which are moved into place together; of a wheel
    (sites/HASH/NAME.whl) the contents are.
    """
    part = tempfile.mkdtemp(prefix=".part-", dir=cache)
    try:
        with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as tar:
            for member in tar:
                if not member.isfile() or member.name.startswith(("/", "..")) or "/../" in member.name:
                    raise ValueError("a name that is not expected: " + member.name)
                target = os.path.join(part, member.name)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                with open(target, "wb") as file:
                    shutil.copyfileobj(tar.extractfile(member), file)
                if target.endswith(".whl"):
                    with zipfile.ZipFile(target) as wheel:
                        wheel.extractall(os.path.dirname(target))
                    os.remove(target)
        moved = 0
        for kind in sorted(os.listdir(part)):
            os.makedirs(os.path.join(cache, kind), exist_ok=True)
            for name in sorted(os.listdir(os.path.join(part, kind))):
                try:
                    os.replace(os.path.join(part, kind, name), os.path.join(cache, kind, name))
                except OSError:  # another bench was first
                    if not os.path.exists(os.path.join(cache, kind, name)):
                        raise
                moved += 1
        return {"moved": moved}
    finally:
        shutil.rmtree(part, ignore_errors=True)


def main():
    operation, cache = sys.argv[1], os.path.expanduser(sys.argv[2])
    try:
        answer = dict({"probe": probe, "have": have, "receive": receive}[operation](cache), ok=True)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        answer = {
            "ok": False,
            "error": f"no space left in {cache}" if full else f"{error.strerror}: {error.filename or cache}",
        }
    except Exception as error:
        answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
