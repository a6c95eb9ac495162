"""Every engine under threads: a small soak of one bundle each, recurrent or with a KV cache in the engine or ours."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from edgecap.benchmarks.soak import break_photos, draw_photos, soak
from edgecap.export.artifact import Source
from edgecap.export.assemble import assemble
from edgecap.export.golden import make_golden
from edgecap.export.targets import TARGETS
from edgecap.runtime import Captioner, write_bundle
from edgecap.runtime.backends import BACKENDS

from ..runtime.test_processes import ENDS, FORKS, ends_with


@pytest.mark.skipif(sys.platform != "linux", reason="the soak reads its memory from /proc")
@pytest.mark.parametrize(
    ("decoder", "name"),
    [("llama", "onnx-fp32"), ("gru", "openvino-fp16"), ("llama", "openvino-fp16"), ("llama", "gguf-q8_0")],
)
def test_no_caption_is_swapped(sources: Callable[[str], Source], decoder: str, name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    for package in (*target.packages, BACKENDS[target.backend].package):
        if find_spec(package) is None:
            pytest.skip(f"{name} needs {package}: pip install 'edgecap[{target.extra}]'")
    source = sources(decoder)
    source.scratch = tmp_path / "build"
    source.scratch.mkdir()
    golden = make_golden(source.checkpoint)
    parts = assemble(source.checkpoint, (name, target), "x", target.build(source), golden, [])
    write_bundle(tmp_path / "x.edgecap", *parts)
    photos = draw_photos(4)
    with Captioner.load(tmp_path / "x.edgecap", threads=1) as captioner:
        found = soak(captioner, photos, break_photos(photos[1]), captions=80, threads=4, warm_up=1)
    assert (found.wrong, found.unclear) == (0, ()) and found.refused > 0 and found.distinct == found.jobs
    for code in (ENDS, FORKS):
        ends_with(code, tmp_path / "x.edgecap", threads=2)
