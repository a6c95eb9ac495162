"""What a page in a browser posts, checked before it is believed: anybody's browser may post anything."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from .latency import STAGES
from .runner import WorkerFailed
from .worker import with_ttft

MAX_TEXT = 4000  # characters of a caption
MAX_TOKENS = 4096
MAX_LOGPROB = 1e6  # away from 0
MAX_SECONDS = 24 * 3600.0

_BROWSERS = (  # in this order: the later ones claim to be the earlier ones, too
    ("Edg(?:A|iOS)?", "Edge"),
    ("OPR", "Opera"),
    ("SamsungBrowser", "Samsung Internet"),
    ("FxiOS|Firefox", "Firefox"),
    ("HeadlessChrome", "headless Chromium"),
    ("CriOS|Chrome", "Chrome"),
    ("Version", "Safari"),
)
_SYSTEMS = (
    (r"Android ([\d.]+)", "Android"),
    (r"(?:iPhone )?OS ([\d_]+) like Mac", "iOS"),
    (r"Windows NT ([\d.]+)", "Windows NT"),
    (r"Mac OS X ([\d_.]+)", "macOS"),
    (r"CrOS \S+ ([\d.]+)", "ChromeOS"),
    (r"Linux()", "Linux"),
)


def checked(request: Mapping[str, Any], answer: Any) -> dict[str, Any]:
    """An answer that is what `request` asks for, without anything else. Raises WorkerFailed, saying what is wrong."""
    if not isinstance(answer, dict):
        raise WorkerFailed("the page answered with something that is not a JSON object")
    if answer.get("ok") is not True:
        raise WorkerFailed(f"in the page: {_text(answer.get('error'), 500) or 'failed without a reason'}")
    op = request["op"]
    if op == "memory":
        bytes = answer.get("bytes")
        return {"bytes": bytes if type(bytes) is int and 0 < bytes < 2**48 else None}
    since = {"since_start": _number(answer, "since_start", "answer")}
    if op == "load":
        return since | {"facts": _facts(answer.get("facts"))}
    run = partial(_run, needed=("end_to_end",) if request.get("once") else ("end_to_end", "picture_to_text"))
    ways: dict[str, tuple[str, Callable[[Any, str], dict[str, Any]]]]
    ways = {"time": ("runs", run), "caption": ("captions", _caption)}
    name, check = ways[op]
    found, wanted = answer.get(name), len(request["photos"])
    if not isinstance(found, list) or len(found) != wanted:
        raise WorkerFailed(f"the page's {name} are not a list of {wanted}")
    return since | {name: [check(each, f"{name}[{i}]") for i, each in enumerate(found)]}


def _facts(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise WorkerFailed("the page's facts are not an object")
    versions = found.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    return {
        "import_s": _number(found, "import_s", "facts"),
        "load_s": _number(found, "load_s", "facts"),
        "threads": _whole(found, "threads", "facts", 1024),
        "engine": _text(found.get("engine"), 20) or "unknown",
        "versions": {_text(name, 40): _text(value, 40) for name, value in list(versions.items())[:8]},
    }


def _run(found: Any, at: str, needed: Sequence[str]) -> dict[str, float]:
    if not isinstance(found, dict):
        raise WorkerFailed(f"the page's {at} is not an object")
    run = with_ttft({stage: _number(found, stage, at) for stage in STAGES if stage in found})
    for stage in needed:
        if run.get(stage, 0.0) <= 0:
            raise WorkerFailed(f"the page's {at} has no time above 0 for {stage}")
    return run | {"tokens": _whole(found, "tokens", at, MAX_TOKENS)}


def _caption(found: Any, at: str) -> dict[str, Any]:
    if not isinstance(found, dict) or not isinstance(found.get("text"), str) or len(found["text"]) > MAX_TEXT:
        raise WorkerFailed(f"the page's {at} has no text of at most {MAX_TEXT} characters")
    ids = found.get("ids")
    if not isinstance(ids, list) or len(ids) > MAX_TOKENS or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise WorkerFailed(f"the page's {at} has no ids of tokens")
    logprob = found.get("logprob")
    if isinstance(logprob, bool) or not isinstance(logprob, int | float) or not abs(logprob) <= MAX_LOGPROB:
        logprob = None
    return {
        "text": _text(found["text"], MAX_TEXT),
        "logprob": logprob,
        "tokens": _whole(found, "tokens", at, MAX_TOKENS),
        "ids": ids,
    }


def _number(found: Mapping[str, Any], key: str, at: str) -> float:
    value = found.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_SECONDS:
        raise WorkerFailed(f"the page's {at} has no {key} in seconds")
    return float(value)


def _whole(found: Mapping[str, Any], key: str, at: str, most: int) -> int:
    value = found.get(key)
    if type(value) is not int or not 0 <= value <= most:
        raise WorkerFailed(f"the page's {at} has no {key} from 0 to {most}")
    return value


def _text(value: Any, most: int) -> str:
    """A text that a terminal and a report can show: no control characters, one line, valid Unicode."""
    if not isinstance(value, str):
        return ""
    value = value[:most].encode("utf-8", "replace").decode("utf-8")
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())


def device_facts(hello: Any) -> dict[str, Any]:
    """What a page says of its device, as far as it is credible: {"user_agent", "cores", "memory_gb", "secure",
    "isolated", "webgpu"}; what it does not tell is None.
    """
    said = hello if isinstance(hello, dict) else {}
    gpu, memory, cores = said.get("webgpu"), said.get("memory_gb"), said.get("cores")
    gpu = gpu if isinstance(gpu, dict) else None
    described = [_text(gpu.get(key), 80) for key in ("vendor", "architecture", "description")] if gpu else []
    good = isinstance(memory, int | float) and not isinstance(memory, bool) and 0 < memory <= 4096
    return {
        "user_agent": _text(said.get("user_agent"), 300),
        "cores": cores if type(cores) is int and 0 < cores <= 4096 else None,
        "memory_gb": memory if good else None,
        "secure": said.get("secure") is True,
        "isolated": said.get("isolated") is True,
        "webgpu": " ".join(filter(None, described)) or "unnamed" if gpu else None,
    }


def browser_name(user_agent: str) -> tuple[str, str]:
    """A user agent string as ("Chrome 150", "Android 15"): what it claims, which browsers make coarser every year."""
    for pattern, name in _BROWSERS:
        if match := re.search(rf"(?:{pattern})/(\d+)", user_agent):
            browser = f"{name} {match[1]}"
            break
    else:
        browser = "unknown browser"
    for pattern, name in _SYSTEMS:
        if match := re.search(pattern, user_agent):
            return browser, f"{name} {match[1].replace('_', '.')}".strip()
    return browser, "unknown system"
