"""The device's end of an ssh connection: starts a worker beside itself, hands lines on, and keeps the time.

The first line says what to start: {"start": "bundle"|"imports"|"limits"|"facts"|"clock", "threads", "memory_limit",
"timeout", "modules"}. From then on a line in is a request, a line out its answer, "since_start" by this machine's
clock. So cold start is the worker's own, without the network's or this process's. It ends with its input, and the
worker with it.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
from typing import Any

from .device import Local
from .runner import Running, Worker, WorkerFailed, python_module


def start(device: Local, first: dict[str, Any]) -> Running:
    """What the first line asks for."""
    if first["start"] == "bundle":
        return device.process(python_module("edgecap.benchmarks.worker"), first["threads"])
    if first["start"] == "limits":
        return device.limits(first["threads"])
    return device.imports(first["modules"], first["threads"])


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def listen(worker: Running, asked: queue.SimpleQueue[bool]) -> None:
    """Hand requests on as they come, without waiting for answers; None of them left: end."""
    for line in sys.stdin:
        try:
            worker.send(json.loads(line))
        except (WorkerFailed, ValueError):
            pass  # receive() tells why
        asked.put(True)
    asked.put(False)
    if isinstance(worker, Worker):
        worker.kill()  # nobody waits for an answer any more


def main() -> None:
    first = json.loads(sys.stdin.readline())
    device = Local()
    device.memory_limit = first.get("memory_limit")
    if first["start"] == "clock":
        say({"ok": True, "clock": device.clock(first["threads"])})
        return
    if first["start"] == "facts":
        say({"ok": True, "facts": device.facts(first["threads"])})
        return
    try:
        worker = start(device, first)
    except WorkerFailed as failure:
        say({"ok": False, "error": str(failure)})
        return
    with worker:
        asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        if first["start"] == "imports":  # answers unasked
            asked.put(True)
        threading.Thread(target=listen, args=(worker, asked), daemon=True).start()
        while asked.get():
            try:
                answer = worker.receive(first["timeout"])
            except WorkerFailed as failure:
                answer = {"ok": False, "error": str(failure)}
            say(answer)


if __name__ == "__main__":
    main()
