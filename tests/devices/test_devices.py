"""Profiles: every one that ships is sound, and a wrong one is told in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgecap.cli import cli
from edgecap.devices import Profile, cpu_facts, get_profile, load_profile, profiles, require_reachable
from edgecap.devices.local import parse_cpuinfo
from edgecap.devices.profile import KINDS
from edgecap.runtime.errors import UsageError

BOARDS = {"cpu", "laptop-x86", "raspberry-pi-4", "raspberry-pi-5", "emulated-arm64"}
EXPECTED = BOARDS | {"android-mid", "android-high", "iphone", "browser"}
GOOD = {"name": "x", "kind": "ssh", "isa": "aarch64", "targets": ["onnx-int8"]}


def test_the_table_has_what_is_promised() -> None:
    assert EXPECTED <= set(profiles())
    assert next(iter(profiles())) == "cpu", "what can be measured here comes first"
    assert get_profile("cpu").reachable


@pytest.mark.parametrize("profile", profiles().values(), ids=lambda p: p.name)
def test_every_profile_is_complete(profile: Profile) -> None:
    assert profile.kind in KINDS and profile.targets and profile.notes
    if profile.kind != "local":
        assert profile.cores and profile.memory_mb, "only this machine can be asked"
    if profile.kind == "browser":
        assert profile.targets[0] == "onnx-fp32", "int8 convolutions are slower in WebAssembly"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"speed": 3}, "unknown key speed"),
        ({"kind": "pigeon"}, "kind must be one of"),
        ({"targets": []}, "targets must be a list"),
        ({"targets": "onnx-int8"}, "targets must be a list"),
        ({"cores": 0}, "cores must be a whole number"),
        ({"cores": True}, "cores must be a whole number"),
        ({"memory_mb": "much"}, "memory_mb must be a whole number"),
        ({"isa": 86}, "isa must be text"),
    ],
)
def test_a_wrong_profile_names_its_source_and_key(change: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        Profile.from_dict(GOOD | change, "devices/x.toml")
    assert caught.value.message.startswith("devices/x.toml: ")


def test_missing_keys_are_named() -> None:
    with pytest.raises(UsageError, match="isa, targets is missing"):
        Profile.from_dict({"name": "x", "kind": "ssh"}, "x.toml")


def test_a_file_must_be_toml_and_called_as_its_device(tmp_path: Path) -> None:
    text = 'name = "x"\nkind = "ssh"\nisa = "aarch64"\ntargets = ["onnx-int8"]\n'
    (tmp_path / "x.toml").write_text(text)
    assert load_profile(tmp_path / "x.toml") == Profile.from_dict(GOOD, "x")
    (tmp_path / "y.toml").write_text(text)
    with pytest.raises(UsageError, match="must be the file's name"):
        load_profile(tmp_path / "y.toml")
    (tmp_path / "z.toml").write_text("name = [")
    with pytest.raises(UsageError, match="cannot read the device profile"):
        load_profile(tmp_path / "z.toml")


def test_unknown_and_unreachable_devices(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown device 'toaster'; known are cpu, "):
        get_profile("toaster")
    require_reachable(get_profile("cpu"))
    with pytest.raises(UsageError, match=r"raspberry-pi-5 \(over ssh\): name its host: --host USER@ADDRESS"):
        require_reachable(get_profile("raspberry-pi-5"))
    for profile in profiles().values():
        if profile.missing:
            assert "\n" not in profile.missing and not profile.reachable


def test_a_local_profile_of_another_isa_is_not_this_machine() -> None:
    here, other = ("x86_64", "arm64") if cpu_facts().isa == "x86_64" else (cpu_facts().isa, "amd64")
    for isa in ("native", here):
        require_reachable(Profile("x", "local", isa, ("onnx-int8",)))
    with pytest.raises(UsageError, match=rf"x \(this machine\): its isa is {other}, and this machine is {here}"):
        require_reachable(Profile("x", "local", other, ("onnx-int8",)))
    pi = get_profile("raspberry-pi-5")
    assert pi.is_isa("aarch64") and pi.is_isa("arm64") and not pi.is_isa("x86_64")


def test_a_profile_of_ones_own_names_its_host(tmp_path: Path) -> None:
    text = 'name = "shed"\nkind = "ssh"\nisa = "aarch64"\ntargets = ["onnx-int8"]\nhost = "pi@shed.local"\n'
    (tmp_path / "shed.toml").write_text(text)
    profile = get_profile(str(tmp_path / "shed.toml"))
    assert profile.host == "pi@shed.local"


def test_cpuinfo_of_an_x86_machine() -> None:
    text = "processor\t: 0\nmodel name\t: Some CPU @ 2GHz\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_int8 f16c sse2\n"
    assert parse_cpuinfo(text) == ("Some CPU @ 2GHz", ("avx2", "avx512f", "avx512_vnni", "amx_int8", "f16c"))


def test_cpuinfo_of_a_raspberry_pi() -> None:
    text = (
        "processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm aes asimdhp cpuid asimddp\n"
        "CPU implementer\t: 0x41\nCPU part\t: 0xd0b\n\nprocessor\t: 1\nFeatures\t: fp\n"
    )
    model, flags = parse_cpuinfo(text)
    assert flags == ("neon", "fp16", "dotprod")
    assert model == "ARM core, implementer 0x41, part 0xd0b"


def test_cpuinfo_that_says_nothing() -> None:
    assert parse_cpuinfo("") == (None, ())


def test_this_machine() -> None:
    facts = cpu_facts()
    assert facts.model and facts.isa
    assert 1 <= facts.cores <= (os.cpu_count() or 1)
    assert facts.memory_mb is None or facts.memory_mb > 64
    assert json.loads(json.dumps(facts.to_dict()))["cores"] == facts.cores


def test_command_lists_every_device_and_marks_what_can_be_measured() -> None:
    result = CliRunner().invoke(cli, ["devices"])
    assert result.exit_code == 0
    lines = result.output.splitlines()
    for name, profile in profiles().items():
        (line,) = [line for line in lines if name in line.split()]
        assert line.startswith("●") == profile.reachable
    assert max(map(len, lines)) <= 100
    assert "  over ssh: edgecap bench --device NAME --host USER@ADDRESS" in lines


def test_command_as_json_is_json_alone() -> None:
    result = CliRunner().invoke(cli, ["devices", "--json"])
    listed = json.loads(result.stdout)
    assert {d["name"]: d["reachable"] for d in listed["devices"]} == {p.name: p.reachable for p in profiles().values()}
    assert listed["this_machine"]["cores"] >= 1
    (pi,) = [d for d in listed["devices"] if d["name"] == "raspberry-pi-5"]
    assert pi["how"] == "edgecap bench --device raspberry-pi-5 --host USER@ADDRESS" and pi["missing"]
