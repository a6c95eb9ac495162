"""Signs that a machine's clock fell, from made-up systems: boards are not at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgecap.devices.throttle import FIRMWARE, fell, read_clock, slowed

NOTHING = {"cap": None, "cooling": None, "events": None, "flags": None, "celsius": None}


def system(root: Path, **files: str) -> Path:
    places = {
        "cap": "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq",
        "most": "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq",
        "state": "sys/class/thermal/cooling_device0/cur_state",
        "kind": "sys/class/thermal/cooling_device0/type",
        "events": "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count",
        "heat": "sys/class/thermal/thermal_zone0/temp",
        "flags": FIRMWARE,
    }
    for name, text in files.items():
        file = root / places[name]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return root


def test_a_system_that_tells_nothing_shows_no_sign(tmp_path: Path) -> None:
    assert read_clock(tmp_path) == NOTHING and not list(fell(NOTHING, NOTHING))
    here = read_clock()
    assert set(here) == set(NOTHING) and (here["celsius"] is None or 0 < here["celsius"] < 150)


def test_what_a_system_tells_is_read(tmp_path: Path) -> None:
    files = {"cap": "1500000", "most": "2400000", "state": "2", "kind": "cpufreq-cpu0", "events": "7", "heat": "82400"}
    found = read_clock(system(tmp_path, **files, flags="0x50005"))
    assert found == {"cap": 0.625, "cooling": 2, "events": 7, "flags": 0x50005, "celsius": 82.4}
    odd = system(tmp_path / "odd", cap="x", most="0", state="9", kind="pwm-fan", events="", heat="-40000", flags="none")
    assert read_clock(odd) == NOTHING | {"events": 0}


def test_siblings_of_a_core_count_its_events_once(tmp_path: Path) -> None:
    for cpu, siblings, events in ((0, "0,2", 7), (1, "1,3", 5), (2, "0,2", 7), (3, "1,3", 5)):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}"
        files = {"topology/thread_siblings_list": siblings, "thermal_throttle/core_throttle_count": events}
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True)
            (folder / name).write_text(f"{text}\n")
    assert read_clock(tmp_path)["events"] == 12


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({"cap": 1.0}, {"cap": 0.6}, ["capped at 60%"]),
        ({"cap": 0.6}, {"cap": 0.6}, []),  # somebody wants it so
        ({"cooling": 0}, {"cooling": 3}, ["cooling device"]),
        ({"events": 5}, {"events": 9}, ["throttled 4 times"]),
        ({"flags": 0}, {"flags": 0x50005}, ["under-voltage", "throttled"]),
        ({"flags": 0x40000}, {"flags": 0x40000}, []),  # long ago
        ({"flags": 0}, {"flags": 0x40000}, ["throttled"]),  # meanwhile, and over
        ({"flags": 0x8}, {"flags": 0x8}, ["soft limit"]),
    ],
)
def test_signs(before: dict, after: dict, words: list[str]) -> None:
    signs = list(fell(NOTHING | before, NOTHING | after))
    assert len(signs) == len(words) and all(word in sign for word, sign in zip(words, signs, strict=True))


def test_products_that_became_slower_are_a_sign() -> None:
    limits = {"read_gb_s": 20.0, "fp32_gflops": 100.0, "int8_gops": None}
    (sign,) = slowed(limits, limits | {"fp32_gflops": 60.0})
    assert "60%" in sign and not list(slowed(limits, limits | {"read_gb_s": 1.0})) and not list(slowed(None, limits))
