"""What engines cannot bear: a process that ends while a thread of it is in one, and one that is forked."""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE = 10.0  # seconds that an ending process waits for the steps being made

_inside: list[int] = []  # threads that are in an engine, once for each call they are in
_ending = False
_loaded: weakref.WeakSet[Any] = weakref.WeakSet()


@contextmanager
def computing() -> Iterator[None]:
    """Around a call of an engine that may take long, or calls of them. Once the process ends, no daemon thread begins
    one: Python is about to stop them. Another thread is at work for someone who waits for it at exit.
    """
    me = threading.get_ident()
    begins = me not in _inside
    _inside.append(me)  # before the look: either this thread sees that the process ends, or `_end` sees this thread
    if begins and _ending and threading.current_thread().daemon:
        _inside.remove(me)
        threading.Event().wait()  # for ever
    try:
        yield
    finally:
        _inside.remove(me)


def mind(engine: Any) -> None:
    """Take care of what was loaded when this process ends or is forked."""
    _loaded.add(engine)
    # Again each time, so that it runs before the finalizers of what was loaded: the last one registered is the first.
    atexit.unregister(_end)
    atexit.register(_end)


def _end() -> None:
    """Daemon threads run on while Python ends. One that then comes back from an engine takes the process down with it
    ("terminate called", a segmentation fault), whatever its exit code was: let each finish its step, and stop there."""
    global _ending
    _ending = True
    until = time.monotonic() + PATIENCE
    while set(_inside) - {threading.get_ident()} and time.monotonic() < until:
        time.sleep(0.002)


def _in_child() -> None:
    """Only the thread that forked is here. To free an engine is to wait for its threads, for ever: it is kept."""
    _inside[:] = [thread for thread in _inside if thread == threading.get_ident()]
    for engine in list(_loaded):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))


atexit.register(_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
