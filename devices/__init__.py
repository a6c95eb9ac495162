"""Where a bundle runs: profiles of devices, and what this machine is."""

from .local import CpuFacts, cpu_facts
from .profile import KINDS, Profile, get_profile, load_profile, profiles, require_reachable

__all__ = ["KINDS", "CpuFacts", "Profile", "cpu_facts", "get_profile", "load_profile", "profiles", "require_reachable"]
