"""Each system under test is a process that answers JSON lines: one that dies or hangs takes nothing along."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from ..devices.confine import MemoryLimit, pinned, size_text
from ..devices.group import kill_group

MAX_LINE = 16 * 2**20  # bytes; an answer is never longer


class WorkerFailed(Exception):
    """A worker did not answer as it should; the text is the reason, in one line."""


def no_answer(timeout: float) -> str:
    seconds = f"{timeout:,.0f}" if timeout >= 10 else f"{timeout:g}"
    return f"gave no answer within {seconds} s (--timeout gives it more)"


def answered(answer: Mapping[str, Any], name: str, count: int) -> list[Any]:
    """The list that an answer holds, an entry for each of so many photos. Raises WorkerFailed."""
    found = answer.get(name)
    if not isinstance(found, list) or len(found) != count:
        raise WorkerFailed(f"answered with {name} that are not a list of {count}")
    return found


def worker_environment(threads: int) -> dict[str, str]:
    """The environment of a measured process: `threads` for every thread pool, and pools that sleep when idle.

    Spinning threads (OMP_WAIT_POLICY=active) on a core shared with other work make everything several times
    slower. Compiled modules are kept, or each cold start would compile them anew, as no installed program does.
    """
    pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    return (
        {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        | dict.fromkeys(pools, str(threads))
        | {
            "OMP_WAIT_POLICY": "passive",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONIOENCODING": "utf-8",
        }
    )


class Running:
    """A worker as the suite sees it, wherever it runs. Use as a context manager: leaving it ends the worker.

    Requests name bundles and photos by their paths here; one that runs elsewhere maps them in `send`.
    """

    def send(self, request: dict[str, Any]) -> None:
        """Send a request without waiting for its answer. Raises WorkerFailed."""
        raise NotImplementedError

    def receive(self, timeout: float) -> dict[str, Any]:
        """The next answer, with "since_start": seconds from the worker's start to this answer, by the clock of the
        device it runs on. Raises WorkerFailed when it says that it failed, or is not there in `timeout` s.
        """
        raise NotImplementedError

    def peak_memory(self, answer: dict[str, Any], timeout: float) -> int | None:
        """The most bytes that it held up to its last answer; None where that cannot be told. Raises WorkerFailed."""
        return answer["peak_rss"]

    def close(self) -> None:
        """End the worker and everything it started."""
        raise NotImplementedError

    def ask(self, op: str, *, timeout: float, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        self.send({"op": op} | arguments)
        return self.receive(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Worker(Running):
    """A process on this machine. `command` is its argv; requests and answers are one JSON object per line.

    cores: the logical ones it may run on (none: as it comes). environment: more variables.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        threads: int = 1,
        cores: Sequence[int] = (),
        limit: MemoryLimit | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._errors = tempfile.TemporaryFile()
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._limit = limit
        self.started = time.perf_counter()
        try:
            with pinned(cores):
                self._process = subprocess.Popen(
                    [*(limit.wrapper if limit else ()), *command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._errors,
                    env=worker_environment(threads) | dict(environment or {}),
                    start_new_session=True,  # a Ctrl-C reaches us alone, and close() can end its children too
                )
        except OSError as error:
            self._errors.close()
            if limit:
                limit.close()
            raise WorkerFailed(f"could not be started: {error}") from error
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if limit:
            limit.watch(self._process.pid, self.kill)
            if limit.wrapper:
                self._wait_for_wrapper()

    def _wait_for_wrapper(self) -> None:
        """The process begins when what sets up its limit has printed an empty line: only then does its time run."""
        try:
            line = self._lines.get(timeout=20)
        except queue.Empty:
            line = b"nothing"
        self.started = time.perf_counter()
        if line != b"\n":
            said = self._why_it_ended() if line is None else "its memory limit could not be set"
            self.close()
            raise WorkerFailed(f"could not be started: {said}")

    def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        try:
            while line := stream.readline(MAX_LINE):
                self._lines.put(line)
        except (OSError, ValueError):
            pass
        self._lines.put(None)

    def send(self, request: dict[str, Any]) -> None:
        stream = self._process.stdin
        assert stream is not None
        try:
            stream.write(json.dumps(request).encode() + b"\n")
            stream.flush()
        except (OSError, ValueError):
            raise WorkerFailed(self._why_it_ended()) from None

    def receive(self, timeout: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            self.kill()
            raise WorkerFailed(no_answer(timeout)) from None
        since = time.perf_counter() - self.started
        if line is None:
            self._lines.put(None)  # so that asking again fails the same way
            raise WorkerFailed(self._why_it_ended())
        try:
            answer = json.loads(line, parse_constant=lambda text: None)  # NaN, which no record can hold
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            self.kill()
            text = line[:60].decode(errors="replace").strip()
            raise WorkerFailed(f"answered with something that is not a JSON object: {text!r}")
        if not answer.get("ok"):
            raise WorkerFailed(" ".join(str(answer.get("error", "failed without a reason")).split()))
        peak = answer.get("peak_rss") or 0
        if self._limit and self._limit.over(peak):
            self.kill()
            raise WorkerFailed(f"{self._limit.reason()} (it held {size_text(peak)})")
        return {"since_start": since} | answer

    def _why_it_ended(self) -> str:
        try:
            code: int | None = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.kill()
            code = None
        if self._limit and self._limit.ended(code):
            return self._limit.reason()
        end = "closed its output" if code is None else f"ended with exit code {code}"
        if code is not None and code < 0:
            name = signal.Signals(-code).name if -code in iter(signal.Signals) else f"signal {-code}"
            end = f"was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - 4096))
        said = last_line(self._errors.read())
        return f"{end}: {said}" if said else end

    def kill(self) -> None:
        """End the process and everything in its group, now."""
        kill_group(self._process)

    def close(self) -> None:
        """Let the worker finish (it ends when its input does), and make sure that it did, and all it started."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
        except OSError:
            pass
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.kill()
            self._process.wait()
            self._reader.join(timeout=2)
            self._process.stdout.close()
            self._errors.close()
            if self._limit:
                self._limit.close()


def python_module(module: str, python: str = sys.executable) -> list[str]:
    """The argv that runs a module with an interpreter, by default this one."""
    return [python, "-m", module]


def run_script(command: Sequence[str], *, timeout: float) -> str | None:
    """Run a peer's script, and end it and all it started after `timeout` s: None, or why it failed, in one line."""
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,
            )
        except OSError as error:
            return f"could not be started: {error.strerror}"
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return f"was not ready within {timeout:,.0f} s"
        finally:  # also when the user stops it
            kill_group(process)
            process.wait()
        errors.seek(0)
        said = last_line(errors.read())
    return None if code == 0 else said or f"its script ended with exit code {code}"


def last_line(said: bytes) -> str:
    """The last line that is not empty, at most 300 characters of it."""
    lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
