"""A device over ssh: a real sshd on this machine's loopback, with keys of its own, as the current user."""

from __future__ import annotations

import getpass
import json
import os
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

import edgecap
from edgecap.benchmarks import remote
from edgecap.benchmarks.bench import bench
from edgecap.benchmarks.datasets import open_dataset
from edgecap.benchmarks.reach import reach
from edgecap.benchmarks.record import package_versions
from edgecap.benchmarks.remote import Ssh
from edgecap.benchmarks.runner import Worker, WorkerFailed
from edgecap.benchmarks.subjects import bundle_subject, peer_subject
from edgecap.benchmarks.suite import Settings
from edgecap.devices import Profile, agent, cpu_facts, get_profile
from edgecap.devices.ssh import Host, unreachable
from edgecap.runtime import Captioner
from edgecap.runtime.errors import EdgecapError

from ..runtime.graphs import write_gru_bundle

SSHD = shutil.which("sshd") or shutil.which("/usr/sbin/sshd")
needs = pytest.mark.skipif(not (SSHD and shutil.which("ssh")), reason="no sshd or ssh (Debian: openssh-server)")
DATA = "scenes:train=1,val=1,test=3,size=32"
QUICK = Settings(rounds=2, min_runs=2, min_seconds=0, warmup=1, cold_starts=1, timeout=60, limit_seconds=0)
QUIET: Any = lambda *phase: None  # noqa: E731


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Profile]:
    """A profile of this machine behind ssh, whose interpreter has edgecap as this one does."""
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "key", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "key.pub",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "UsePAM": "no",
        "StrictModes": "no",
        "PidFile": "none",
    }
    (folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    key = (folder / "host.pub").read_text()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {key}")
    config = (
        "  HostName 127.0.0.1\n  IdentitiesOnly yes\n  LogLevel ERROR\n"
        f"  User {getpass.getuser()}\n  Port {port}\n  UserKnownHostsFile {folder}/"
    )
    (folder / "config").write_text(
        f"Host board\n  IdentityFile {folder}/key\n{config}known_hosts\n"
        f"Host stranger\n  IdentityFile {folder}/other\n{config}known_hosts\n"
        f"Host unknown\n  IdentityFile {folder}/key\n{config}none\n"
    )
    (folder / "code").mkdir()
    (folder / "code" / "edgecap").symlink_to(Path(edgecap.__file__).parent)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder}/code exec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # a system's own start makes it
    with (folder / "log").open("wb") as log:
        sshd = subprocess.Popen([str(SSHD), "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    try:
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        else:
            pytest.skip(f"sshd does not start: {(folder / 'log').read_text().strip()[-200:]}")
        text = 'name = "board"\nkind = "ssh"\nisa = "native"\ntargets = ["onnx-int8"]\nhost = "board"\n'
        text += f'ssh_config = "{folder}/config"\npython = "{python}"\ncache = "{folder}/cache"\n'
        (folder / "board.toml").write_text(text)
        yield get_profile(str(folder / "board.toml"))
    finally:
        sshd.terminate()
        sshd.wait(timeout=10)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "x.edgecap"
    write_gru_bundle(path, 0, lineage={"data": DATA, "passes": []})
    return path


@needs
def test_the_same_bench_runs_there_and_its_record_comes_back(board: Profile, bundle: Path, tmp_path: Path) -> None:
    device = str(Path(board.ssh_config).with_name("board.toml"))
    found = bench([bundle], device=device, settings=QUICK)
    (row,) = found["rows"]
    assert row["status"] == "ok", row["error"]
    assert found["device"]["kind"] == "ssh" and found["device"]["cpu"] == cpu_facts().to_dict()
    assert found["versions"] == package_versions() and found["reference"]["seconds"] > 0
    assert row["cold_start"]["import_s"] + row["cold_start"]["load_s"] < row["cold_start"]["seconds"]
    assert row["memory"]["peak_rss"] > 10 * 2**20 and row["latency"]["end_to_end"]["runs"] >= QUICK.min_runs
    captioner = Captioner.load(bundle)
    for example in open_dataset(DATA).splits["test"]:
        own = captioner(example.jpeg_path(tmp_path))
        said = row["captions"][example.id]
        assert (said["text"], said["logprob"]) == (own.text, pytest.approx(own.logprob))


@needs
def test_only_what_is_missing_is_sent(board: Profile, bundle: Path, tmp_path: Path) -> None:
    profile = replace(board, cache=str(tmp_path / "cache"))
    files = [(path.name, path) for path in sorted(bundle.iterdir())]
    steps: list[tuple[int, int]] = []
    with Ssh(profile) as device:
        free = device.host.probe()["free"]
        sent = device.host.ship({"bundles/a": files}, free, lambda *step: steps.append(step))
        assert sent == sum(path.stat().st_size for _, path in files) and steps == [(0, 1), (1, 1)]
        again = {"bundles/a": files, "photos/b.png": [("", files[0][1])]}
        assert device.host.ship(again, free, lambda *step: None) == files[0][1].stat().st_size
        assert device.host.ship(again, free, lambda *step: None) == 0
        with pytest.raises(EdgecapError, match=r"board has 0 MB free in .*, and .* MB are needed"):
            device.host.ship({"bundles/c": files}, 10, lambda *step: None)
    there = tmp_path / "cache" / "bundles" / "a"
    assert {path.name: path.read_bytes() for path in there.iterdir()} == {n: p.read_bytes() for n, p in files}
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["bundles", "photos"]


@needs
def test_edgecap_itself_is_shipped_to_a_device_without_it(
    board: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own wheel, to the system's Python; what it imports besides is the next test's."""
    monkeypatch.setattr(remote, "wheel_set", lambda cache, platform: [])
    try:
        with reach(replace(board, python="", cache=str(tmp_path / "cache dir"))) as device:
            device.prepare([], [], QUIET)
            facts = device.facts(1)
    except EdgecapError as error:
        if "no Python 3.11" in error.message:
            pytest.skip(error.message)
        raise
    assert facts["versions"]["edgecap"] == edgecap.__version__ and facts["pinned"]
    (site,) = (tmp_path / "cache dir" / "sites").iterdir()
    assert (site / "edgecap" / "benchmarks" / "relay.py").is_file() and not list(site.glob("*.whl"))


@needs
def test_a_device_that_has_nothing_gets_all_that_a_bench_needs(
    board: Profile, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real wheels by pip, to the system's own Python: what a worker imports and nobody sent would end it."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(tmp_path), "tokenizers"]
    if subprocess.run(pip, capture_output=True).returncode:
        pytest.skip("pip finds no packages here: wheels for devices are not tested")
    monkeypatch.setenv("EDGECAP_CACHE", str(tmp_path / "here"))
    own = Path(board.ssh_config).with_name("board.toml").read_text().splitlines()
    kept = [line for line in own if not line.startswith(("name", "python", "cache"))]
    (tmp_path / "bare.toml").write_text("\n".join([*kept, 'name = "bare"', f'cache = "{tmp_path}/there"']))
    try:
        found = bench([bundle], device=str(tmp_path / "bare.toml"), settings=QUICK)
    except EdgecapError as error:
        if "no Python 3.11" in error.message:
            pytest.skip(error.message)
        raise
    (row,) = found["rows"]
    assert row["status"] == "ok" and not found["problems"], row["error"]
    assert found["versions"] | {"python": ""} == package_versions() | {"python": ""}
    sites = [{path.name for path in site.iterdir()} for site in (tmp_path / "there" / "sites").iterdir()]
    for package in ("edgecap", "numpy", "PIL", "onnxruntime", "tokenizers"):
        assert sum(package in site for site in sites) == 1, package


@needs
def test_a_worker_there_ends_with_its_connection_and_within_its_memory(board: Profile, bundle: Path) -> None:
    subject = bundle_subject(bundle)[0]

    def workers() -> list[psutil.Process]:
        found = psutil.process_iter(["cmdline"])
        return [p for p in found if "edgecap.benchmarks.worker" in (p.info["cmdline"] or []) and p.pid not in before]

    before: set[int] = set()
    before |= {p.pid for p in workers()}
    with Ssh(board) as device:
        device.prepare([subject], [], QUIET)
        with device.start(subject, 1) as worker:
            answer = worker.ask("load", timeout=60, **subject.load_request(1))
            assert 0 < answer["since_start"] < 60
            with pytest.raises(WorkerFailed, match="unknown request 'dance'"):
                worker.ask("dance", timeout=60)
            assert worker.ask("load", timeout=60, **subject.load_request(1))["ok"]
            assert len(workers()) >= 1
        end = time.monotonic() + 10
        while workers():
            assert time.monotonic() < end, "a worker outlives its connection"
            time.sleep(0.05)
        device.memory_limit = 20 * 2**20
        with device.start(subject, 1) as worker:
            with pytest.raises(WorkerFailed, match="over its memory limit of 20 MiB"):
                worker.ask("load", timeout=60, **subject.load_request(1))
        with pytest.raises(WorkerFailed, match="peers run on this machine alone"):
            device.start(peer_subject(f"torch:{bundle}", {}), 1)


@needs
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"host": "stranger"}, r"cannot reach stranger: .*Permission denied.*ssh-copy-id HOST puts a key there"),
        ({"host": "unknown"}, "cannot reach unknown: its host key is not known here yet: connect once by hand"),
        ({"host": "ssh://127.0.0.1:1"}, "cannot reach ssh://127.0.0.1:1: .*Connection refused"),
        ({"host": "-oProxyCommand=x"}, "a host cannot begin with a dash"),
        ({"python": "/no/such/python"}, "board: /no/such/python does not work there: .*(not found|No such file)"),
        ({"cache": "/proc/none"}, "board: No such file or directory: /proc/none"),
        ({"isa": "riscv64"}, r"board is \w+, and device board is riscv64: .* its own, --device my/board.toml"),
    ],
)
def test_what_is_wrong_is_one_line(board: Profile, change: dict[str, str], said: str) -> None:
    with pytest.raises(EdgecapError, match=said) as caught, Ssh(replace(board, **change)) as device:
        device.prepare([], [], QUIET)
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2 or "isa" not in change


@needs
def test_an_old_python_and_one_without_edgecap(board: Profile, tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\necho '" + json.dumps({"ok": True, "python": "3.9", "free": 1}) + "'\n")
    old.chmod(0o755)
    with (
        Host(replace(board, python=str(old))) as host,
        pytest.raises(EdgecapError, match="is Python 3.9; 3.11 or newer"),
    ):
        host.probe()
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -I -S "$@"\n')
    bare.chmod(0o755)
    with Ssh(replace(board, python=str(bare))) as device, pytest.raises(EdgecapError, match="cannot run edgecap there"):
        device.prepare([], [], QUIET)
        device.facts(1)


@needs
def test_a_command_that_hangs_there_is_ended(board: Profile) -> None:
    with Host(board) as host:
        assert host.run("true")[0] == 0
        with pytest.raises(EdgecapError, match="was not done within 1 s"):
            host.run("sleep 30", timeout=1)


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Host, Path]]:
    """A host behind a program in place of ssh, and where that lies."""
    program = tmp_path / "ssh"
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with Host(Profile("x", "ssh", "native", ("onnx-int8",), host="x")) as host:
        yield host, program
        program.write_text("#!/bin/sh\n")


def test_a_connection_that_breaks_while_it_is_given_bytes_says_why(fake_ssh: tuple[Host, Path]) -> None:
    """Before, a BrokenPipeError: what was left in the pipe's buffer was written again."""
    host, program = fake_ssh
    program.write_text("#!/bin/sh\necho the network is gone >&2; exec 0<&-; exit 255\n")

    def give(stream: Any) -> None:
        for _ in range(4000):
            stream.write(b"x" * 1000)

    with pytest.raises(EdgecapError, match="cannot reach x: the network is gone"):
        host.run("cat", give=give)


def test_what_a_hanging_connection_started_is_ended_too(fake_ssh: tuple[Host, Path]) -> None:
    """Before, what it started held its output open, and was waited for."""
    host, program = fake_ssh
    program.write_text("#!/bin/sh\nsleep 30 & sleep 30\n")
    began = time.monotonic()
    with pytest.raises(EdgecapError, match="x was not done within 0 s"):
        host.run("true", timeout=0.3)
    assert time.monotonic() - began < 15


def test_systems_without_wheels_are_told() -> None:
    with Host(Profile("x", "ssh", "native", ("onnx-int8",), host="x")) as host:
        with pytest.raises(EdgecapError, match="x runs Darwin, for which wheels are not shipped"):
            host.platform({"system": "Darwin", "machine": "arm64", "python": "3.12", "glibc": ""})
        with pytest.raises(EdgecapError, match="a Linux without glibc"):
            host.platform({"system": "Linux", "machine": "aarch64", "python": "3.12", "glibc": ""})
        with pytest.raises(EdgecapError, match="x runs a 32-bit system, for which there are no wheels"):
            host.platform({"system": "Linux", "machine": "aarch64", "python": "3.12", "glibc": "2.36", "bits": 32})
    assert agent.probe(os.path.expanduser("~"))["bits"] == 8 * struct.calcsize("P")
    assert unreachable("") == "ssh says nothing"


@pytest.mark.parametrize(("version", "said"), [("0.0.1", "x measures edgecap 0.0.1; this machine has"), (None, "")])
def test_another_edgecap_there_is_told(
    version: str | None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    code = f'print(\'{{"ok": true, "facts": {{"versions": {json.dumps({"edgecap": version})}}}}}\', flush=True)'
    monkeypatch.setattr(Ssh, "_relay", lambda *_, **__: Worker([sys.executable, "-c", code]))
    device = Ssh(Profile("x", "ssh", "native", ("onnx-int8",), host="x", python="/opt/python"))
    assert device.facts(1)["versions"] == {"edgecap": version}
    assert (said in (told := capsys.readouterr().err)) and bool(told) == bool(said)
    shutil.rmtree(device.host._folder)


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def full(cache: str) -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(agent, "receive", full)
    monkeypatch.setattr(sys, "argv", ["agent", "receive", str(tmp_path)])
    agent.main()
    assert json.loads(capsys.readouterr().out) == {"ok": False, "error": f"no space left in {tmp_path}"}
