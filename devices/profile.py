"""Device profiles: one TOML file each, so that a new device is a new file and nothing else."""

from __future__ import annotations

import platform
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..runtime.errors import EdgecapError, UsageError
from .local import isa_name


@dataclass(frozen=True)
class Kind:
    """A way to reach devices. how: the command, NAME standing for the device's. `missing` tells what reaching this one
    lacks, in one line, or None when nothing.
    """

    label: str
    how: str
    missing: Callable[[Profile], str | None] = lambda profile: None


def _local_lacks(profile: Profile) -> str | None:
    found = isa_name(platform.machine())
    return None if profile.is_isa(found) else f"its isa is {profile.isa}, and this machine is {found}"


def _ssh_lacks(profile: Profile) -> str | None:
    if not shutil.which("ssh"):
        return "there is no ssh program here"
    return None if profile.host else "name its host: --host USER@ADDRESS, or host = in a profile of your own"


def _emulation_lacks(profile: Profile) -> str | None:
    from .emulated_arm64 import missing

    return missing()


def _browser_lacks(profile: Profile) -> str | None:
    from .webfiles import lacking

    return lacking()


KINDS = {
    "local": Kind("this machine", "edgecap bench --device NAME", _local_lacks),
    "ssh": Kind("over ssh", "edgecap bench --device NAME --host USER@ADDRESS", _ssh_lacks),
    "browser": Kind("a web page opened there", "edgecap bench --device NAME", _browser_lacks),
    "emulated-arm64": Kind("emulated here by qemu", "edgecap bench --device NAME", _emulation_lacks),
}


@dataclass(frozen=True)
class Profile:
    """One device. `cores` and `memory_mb` (MiB) are None where the machine itself is asked."""

    name: str
    kind: str  # a key of KINDS
    isa: str  # x86_64, aarch64, wasm32, or native: whatever this machine is
    targets: tuple[str, ...]  # export targets, the one to try first in front
    notes: str = ""
    cores: int | None = None
    memory_mb: int | None = None
    host: str = ""  # ssh: USER@ADDRESS, ssh://USER@ADDRESS:PORT, or a name in ssh's own configuration
    ssh_config: str = ""  # ssh: another configuration file than the user's
    cache: str = "~/.cache/edgecap"  # ssh: the folder there for what is shipped
    python: str = ""  # ssh: an interpreter there that has edgecap; otherwise one is made from shipped wheels

    @property
    def missing(self) -> str | None:
        """What `edgecap bench --device` lacks to measure on it now, in one line; None when nothing."""
        return KINDS[self.kind].missing(self)

    @property
    def reachable(self) -> bool:
        return self.missing is None

    def is_isa(self, found: str) -> bool:
        """Whether a machine of this ISA can be the device."""
        return self.isa == "native" or isa_name(self.isa) == isa_name(found)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"targets": list(self.targets)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> Profile:
        """Check a parsed TOML table; raises UsageError naming `source` and the key that is wrong."""
        known = {f.name: f for f in fields(cls)}
        if unknown := sorted(set(values) - set(known)):
            raise UsageError(f"{source}: unknown key {', '.join(unknown)}; known are {', '.join(known)}")
        if missing := [n for n, f in known.items() if f.default is MISSING and n not in values]:
            raise UsageError(f"{source}: {', '.join(missing)} is missing")
        for key, value in values.items():
            if key == "targets":
                good = isinstance(value, list) and value and all(isinstance(t, str) for t in value)
                wanted = "a list of export targets"
            elif key in ("cores", "memory_mb"):
                good = isinstance(value, int) and not isinstance(value, bool) and value > 0
                wanted = "a whole number above 0"
            else:
                good = isinstance(value, str)
                wanted = "text"
            if not good:
                raise UsageError(f"{source}: {key} must be {wanted}, not {value!r}")
        if values["kind"] not in KINDS:
            raise UsageError(f"{source}: kind must be one of {', '.join(KINDS)}, not {values['kind']!r}")
        return cls(**(values | {"targets": tuple(values["targets"])}))


def load_profile(path: Path) -> Profile:
    """Read one profile file. The file's name is the device's name."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read the device profile {path}: {error}") from error
    profile = Profile.from_dict(values, str(path))
    if profile.name != path.stem:
        raise UsageError(f"{path}: name is {profile.name!r}; it must be the file's name, {path.stem!r}")
    return profile


def profiles() -> dict[str, Profile]:
    """Every profile that ships with edgecap, by name; what can be measured now comes first, this machine before all."""
    folder = Path(str(files(__package__) / "profiles"))
    found = [load_profile(path) for path in sorted(folder.glob("*.toml"))]
    if not found:
        raise EdgecapError(f"no device profiles in {folder}: install edgecap again")
    return {p.name: p for p in sorted(found, key=lambda p: (not p.reachable, p.kind != "local", p.name))}


def get_profile(name: str) -> Profile:
    """The profile called `name`, or in the file of that name (…/x.toml). Raises UsageError listing the names there
    are.
    """
    if name.endswith(".toml"):
        return load_profile(Path(name))
    known = profiles()
    if name not in known:
        raise UsageError(f"unknown device {name!r}; known are {', '.join(known)} (see edgecap devices)")
    return known[name]


def require_reachable(profile: Profile) -> None:
    """Raise UsageError when the bench cannot run on this device now, saying what is missing."""
    if (missing := profile.missing) is not None:
        raise UsageError(f"cannot reach device {profile.name} ({KINDS[profile.kind].label}): {missing}")
