"""A device behind ssh: one connection that all commands share, what is there, and shipping what is missing.

The system's own ssh does the talking, so ~/.ssh/config, keys and jump hosts work as they do by hand.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

from ..runtime.errors import EdgecapError, UsageError
from . import agent
from .group import kill_group
from .profile import Profile
from .wheels import Platform

OLDEST = (3, 11)
ANSWER = 120.0  # s for a command that only asks
SLOWEST = 100_000  # bytes a second of a network and a disk that are worth waiting for
# Prints the first Python that is new enough; else the version of the one there is.
FIND_PYTHON = (
    "for p in python3 python3.14 python3.13 python3.12 python3.11; do "
    'command -v "$p" >/dev/null 2>&1 && "$p" -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null '
    '&& { echo "$p"; exit 0; }; done; python3 --version 2>&1; exit 3'
)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, 32 hex digits of it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


class Host:
    """One device. Use as a context manager: leaving it ends the connection."""

    def __init__(self, profile: Profile) -> None:
        if profile.host.startswith("-"):
            raise UsageError(f"a host cannot begin with a dash: {profile.host!r}")
        self.name, self._config, self._cache = profile.host, profile.ssh_config, profile.cache
        self._profile = profile
        self._folder = tempfile.mkdtemp(prefix="edgecap-ssh-")  # short: a socket's path is 104 characters at most
        self.python = profile.python

    def argv(self, command: str) -> list[str]:
        """The argv here that runs a shell command there."""
        options = {
            "BatchMode": "yes",  # never ask: a question would hang the bench
            "ConnectTimeout": 15,
            "ServerAliveInterval": 15,
            "ControlMaster": "auto",
            "ControlPath": f"{self._folder}/c",
            "ControlPersist": 60,
        }
        config = ["-F", str(Path(self._config).expanduser())] if self._config else []
        words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        return ["ssh", *config, *words, self.name, command]

    def module(self, module: str, environment: Mapping[str, str]) -> list[str]:
        """The argv here that runs a Python module there; any login shell understands it."""
        values = [f"{name}={value}" for name, value in environment.items()]
        return self.argv(shlex.join(["env", *values, self.python, "-s", "-m", module]))

    def run(
        self, command: str, *, give: Callable[[IO[bytes]], None] | None = None, timeout: float = ANSWER
    ) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of a command there; `give` writes its input. Raises EdgecapError where the
        device cannot be reached, or the command is not done after `timeout` s.
        """
        with tempfile.TemporaryFile() as errors:
            try:
                process = subprocess.Popen(
                    self.argv(command),
                    stdin=subprocess.PIPE if give else subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    start_new_session=True,  # the connection outlives a Ctrl-C, until it is closed
                )
            except OSError as error:
                raise EdgecapError(f"ssh cannot be started: {error.strerror}") from error
            late = threading.Event()
            timer = threading.Timer(timeout, lambda: (late.set(), kill_group(process)))
            timer.start()
            try:
                with process:
                    if give:
                        assert process.stdin is not None
                        with suppress(BrokenPipeError):  # it says why
                            give(process.stdin)
                        with suppress(BrokenPipeError):  # which writes what is left, or Popen would
                            process.stdin.close()
                    assert process.stdout is not None
                    out = process.stdout.read().decode(errors="replace")
                    code = process.wait()
            finally:
                timer.cancel()
            if late.is_set():
                raise EdgecapError(f"{self.name} was not done within {timeout:,.0f} s: is its disk or network stuck?")
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip()
        if code == 255:
            raise EdgecapError(f"cannot reach {self.name}: {unreachable(said)}")
        return code, out, said

    def find_python(self) -> None:
        """Choose the device's Python, where the profile names none. Raises EdgecapError where it is too old."""
        if self.python:
            return
        code, out, _ = self.run(shlex.join(["sh", "-c", FIND_PYTHON]))
        if code or not out.strip():
            found = out.strip().removeprefix("Python ").splitlines()[-1:] or ["none"]
            raise EdgecapError(f"{self.name} has no Python 3.11 or newer (found: {found[0][:60]}): install one there")
        self.python = out.split()[0]

    def call(
        self, operation: str, *, give: Callable[[IO[bytes]], None] | None = None, timeout: float = ANSWER
    ) -> dict[str, Any]:
        """Run an operation of agent.py there. Raises EdgecapError with its reason."""
        source = Path(agent.__file__).read_text(encoding="utf-8")
        command = shlex.join([self.python, "-c", source, operation, self._cache])
        code, out, said = self.run(command, give=give, timeout=timeout)
        try:
            answer = json.loads(out.strip().splitlines()[-1])
        except (IndexError, ValueError):
            last = (said or out).strip().splitlines()[-1:] or [f"exit code {code}"]
            raise EdgecapError(f"{self.name}: {self.python} does not work there: {last[0][:200]}") from None
        if not answer.get("ok"):
            raise EdgecapError(f"{self.name}: {answer.get('error')}")
        return answer

    def probe(self) -> dict[str, Any]:
        """See agent.probe. Raises EdgecapError in one line where edgecap cannot run on the device, UsageError where it
        is not the profile's: its figures would bear another device's name.
        """
        self.find_python()
        found = self.call("probe")
        if tuple(map(int, found["python"].split("."))) < OLDEST:
            raise EdgecapError(f"{self.name}: {self.python} is Python {found['python']}; 3.11 or newer is needed")
        isa, profile = found["machine"], self._profile
        if not profile.is_isa(isa) and (profile.python or found.get("bits") != 32):  # else `platform` says it better
            raise UsageError(
                f"{self.name} is {isa}, and device {profile.name} is {profile.isa}: measure it by a profile of its "
                "own, --device my/board.toml"
            )
        return found

    def platform(self, found: Mapping[str, Any]) -> Platform:
        """The wheels that a probed device takes. Raises EdgecapError for systems that have none."""
        if found["system"] != "Linux" or not found["glibc"]:
            system = found["system"] if found["system"] != "Linux" else "a Linux without glibc"
            raise EdgecapError(
                f"{self.name} runs {system}, for which wheels are not shipped: install edgecap there and name its "
                "interpreter as python = in the profile"
            )
        if found.get("bits") == 32:
            raise EdgecapError(f"{self.name} runs a 32-bit system, for which there are no wheels: install a 64-bit one")
        return Platform(found["machine"], found["python"], found["glibc"])

    def ship(
        self, wanted: Mapping[str, Sequence[tuple[str, Path]]], free: int, progress: Callable[[int, int], None]
    ) -> int:
        """Send what is missing of `wanted`: place in the cache ("bundles/HASH") → its files' names and paths here.
        Returns the bytes sent. Raises EdgecapError, also where they do not fit into `free` bytes.
        """
        names = json.dumps(list(wanted)).encode()
        there = set(self.call("have", give=lambda stream: _write(stream, names))["have"])
        missing = {place: files for place, files in wanted.items() if place not in there}
        sizes = {p: sum(path.stat().st_size for _, path in files) for p, files in missing.items()}
        # Unpacked wheels are three to four times as large.
        needed = sum(size * (5 if place.startswith("sites/") else 1) for place, size in sizes.items())
        if needed > free:
            raise EdgecapError(
                f"{self.name} has {free / 1e6:,.0f} MB free in {self._cache}, and {needed / 1e6:,.0f} MB are needed"
            )
        done = len(wanted) - len(missing)
        progress(done, len(wanted))
        if not missing:
            return 0

        def give(stream: IO[bytes]) -> None:
            nonlocal done
            with tarfile.open(fileobj=stream, mode="w|") as tar:
                for place, files in missing.items():
                    for name, path in files:
                        tar.add(path.resolve(), f"{place}/{name}" if name else place, recursive=False)
                    progress(done := done + 1, len(wanted))

        whole = sum(sizes.values())
        self.call("receive", give=give, timeout=ANSWER + whole / SLOWEST)
        return whole

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        exits = self.argv("true")
        try:
            subprocess.run([*exits[:-2], "-O", "exit", self.name], capture_output=True, check=False, timeout=10)
        except subprocess.TimeoutExpired:
            pass
        shutil.rmtree(self._folder, ignore_errors=True)


def _write(stream: IO[bytes], data: bytes) -> None:
    stream.write(data)


def unreachable(said: str) -> str:
    """One line that says why, and what to do, from what ssh printed."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = lines[-1] if lines else "ssh says nothing"
    text = " ".join(lines).lower()
    if "host key verification failed" in text:
        return "its host key is not known here yet: connect once by hand, ssh HOST"
    if "permission denied" in text:
        return f"{last} (no password is asked for: ssh-copy-id HOST puts a key there)"
    return last
