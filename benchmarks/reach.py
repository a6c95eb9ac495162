"""How a profile's device is reached."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..devices import KINDS
from ..runtime.errors import UsageError
from .device import Device, Local

if TYPE_CHECKING:
    from ..devices import Profile


def _browser(profile: Profile, **how: Any) -> Device:
    from .browser import Browser  # a server and more, which other devices do not need

    return Browser(profile, **how)


def _emulated(profile: Profile) -> Device:
    from .emulated import Emulated

    return Emulated(profile)


def _ssh(profile: Profile) -> Device:
    from .remote import Ssh

    return Ssh(profile)


# One entry per kind of profile: how a device of that kind is reached.
WAYS: dict[str, Callable[..., Device]] = {
    "local": Local,
    "ssh": _ssh,
    "browser": _browser,
    "emulated-arm64": _emulated,
}
LIMITED = ("local", "ssh")  # the kinds whose workers' memory can be limited


def reach(profile: Profile, *, memory_limit: int | None = None, **how: Any) -> Device:
    """The device of a profile that can be reached (see require_reachable). Raises EdgecapError in one line.

    memory_limit: bytes a worker may hold; by default a local profile's memory_mb. how: what its kind alone can be told.
    """
    if memory_limit and profile.kind not in LIMITED:
        raise UsageError(f"device {profile.name} ({KINDS[profile.kind].label}): memory cannot be limited there")
    device = WAYS[profile.kind](profile, **how)
    if memory_limit is None and profile.kind == "local" and profile.memory_mb:
        memory_limit = profile.memory_mb * 2**20
    device.memory_limit = memory_limit
    return device
