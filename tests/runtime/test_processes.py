"""A process that ends while threads caption, and one that is forked: a GRU on ONNX Runtime."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

LOAD = """
import os, signal, sys, threading, time
import numpy as np
from edgecap.runtime import Captioner
photos = np.random.default_rng(0).integers(0, 256, (3, 32, 40, 3), np.uint8)
captioner = Captioner.load(sys.argv[1], threads=int(sys.argv[2]), verify="sizes")
expected = captioner(photos[0], beam=3).text
"""

ENDS = """
def work(photo):
    while True:
        for piece in captioner.stream(photo, max_length=9, min_length=9):
            pass
        captioner(photo, beam=3, max_length=9, min_length=9)

for photo in photos:
    threading.Thread(target=work, args=(photo,), daemon=True).start()
time.sleep(0.05)
sys.exit(7)
"""

FORKS = """
stream = captioner.stream(photos[1], min_length=3)
next(stream)
child = os.fork()
if not child:
    signal.alarm(20)
    assert captioner(photos[0], beam=3).text == expected
    again = Captioner.load(sys.argv[1], threads=int(sys.argv[2]), verify="sizes")
    assert again(photos[0], beam=3).text == expected
    again.close()
    del stream
    captioner.close()
    sys.exit(7)
_, status = os.waitpid(child, 0)
assert captioner(photos[0], beam=3).text == expected
sys.exit(os.waitstatus_to_exitcode(status))
"""


def ends_with(code: str, bundle: Path, threads: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD + code, str(bundle), str(threads)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    assert done.returncode == 7 and done.stderr == "", f"{done.returncode}: {done.stderr[-2000:]}"


def test_a_process_that_ends_waits_for_the_engine_and_lets_none_begin():
    code = """
import sys, threading, time
from edgecap.runtime.process import computing

def work():
    with computing():
        began.set()
        time.sleep(0.3)
        print("ended", flush=True)
    time.sleep(0.01)
    with computing():
        print("began again", flush=True)

began = threading.Event()
threading.Thread(target=work, daemon=True).start()
began.wait()
sys.exit(7)
"""
    done = subprocess.run(
        [sys.executable, "-c", "import edgecap.runtime.backends" + code], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "ended\n", "")


ONES = """
import atexit, sys, threading, time

def work(name):
    with computing():
        with computing():
            pass
        began.set()
        time.sleep(0.3)
        print(name, flush=True)

def asked(name, daemon):
    began.clear()
    thread = threading.Thread(target=work, args=(name,), daemon=daemon)
    thread.start()
    began.wait(20)
    return thread

began = threading.Event()
atexit.register(lambda: asked("at exit", False).join(20))  # runs after what `computing` registers
from edgecap.runtime.process import computing
import edgecap.runtime.backends
asked("twice inside", True)
sys.exit(7)
"""


def test_a_thread_that_is_waited_for_at_exit_may_compute_and_one_inside_twice_is_inside():
    """Before, the first was held for ever, and the second was no longer waited for after the inner call."""
    done = subprocess.run([sys.executable, "-c", ONES], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (7, "twice inside\nat exit\n", "")


def test_a_process_that_ends_while_daemon_threads_caption(bundle_path):
    """Before, "terminate called" now and then, where a step takes long mostly."""
    ends_with(ENDS, bundle_path, 2)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_process_captions_and_ends(bundle_path, threads):
    """Before: with two threads it never ended."""
    ends_with(FORKS, bundle_path, threads)
