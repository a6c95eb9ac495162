"""The OpenVINO targets: the same tokens as torch however rows move, the weights' bits, the same bytes twice."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from edgecap.export.artifact import Artifact, BuildOptions, Source
from edgecap.export.calibration import Calibration
from edgecap.export.graph import Graph
from edgecap.export.openvino_graphs import build
from edgecap.export.statistics import layers_of
from edgecap.runtime import Bundle, DecodeOptions, EdgecapError, UsageError
from edgecap.runtime.decode import decode
from edgecap.train.checkpoint import Checkpoint, load_checkpoint

from .nets import photos, save_run

pytest.importorskip("openvino", reason="these tests need openvino: pip install 'edgecap[openvino-export]'")
pytest.importorskip("nncf", reason="these tests need nncf: pip install 'edgecap[openvino-export]'")

PRECISIONS = ("fp32", "fp16", "int8", "int4")
LOGITS = {
    "fp32": 0.999999,
    "fp16": 0.9999,
    "int8": 0.98,
    "int4": 0.8,
}  # cosine with torch's, of random nets: trained ones lose far less


@pytest.fixture(scope="module", params=["gru", "llama"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp(request.param)
    loaded = load_checkpoint(save_run(folder / "run", request.param, seed=4))
    (folder / "scratch").mkdir()
    return Source(loaded, Calibration(photos(8), [[5, 6, 7]] * 8, loaded.tokens), folder / "scratch")


@pytest.fixture(scope="module")
def artifacts(source: Source) -> dict[str, Artifact]:
    return {precision: build(source, precision) for precision in PRECISIONS}


@pytest.fixture(scope="module")
def models(source: Source, artifacts: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("bundles")
    return {name: load(source.checkpoint, made, folder / name) for name, made in artifacts.items()}


def load(checkpoint: Checkpoint, artifact: Artifact, folder: Path, **changes):
    """The artifact in its engine, by way of files: what a bundle has and the backend asks for."""
    from edgecap.runtime.backends.openvino import OpenVinoModel

    folder.mkdir()
    for name, content in artifact.files.items():
        (folder / name).write_bytes(content)
    manifest = {"graphs": artifact.graphs, "session": artifact.session, "tokens": checkpoint.tokens}
    manifest |= {"files": dict.fromkeys(artifact.files)} | changes
    return OpenVinoModel.load(Bundle(folder, manifest), threads=1)


def search(source: Source, session, pixels: np.ndarray, beam: int) -> list[list[int]]:
    tokens = source.checkpoint.tokens
    suppress = tuple(tokens[name] for name in ("bos", "pad", "unk"))
    options = DecodeOptions(beam=beam, max_length=8)
    return [
        list(best[0].token_ids) for best in decode(session, pixels, options, eos_id=tokens["eos"], suppress=suppress)
    ]


@pytest.mark.parametrize("beam", [1, 3])
def test_fp32_says_what_torch_says_in_batches_and_alone(source: Source, models, beam: int) -> None:
    pixels = photos(5, seed=8)
    wanted = search(source, source.checkpoint.model.session(), pixels, beam)
    assert beam == 1 or len({tuple(ids) for ids in wanted}) > 1
    assert search(source, models["fp32"].session(), pixels, beam) == wanted
    assert [search(source, models["fp32"].session(), one[None], beam)[0] for one in pixels] == wanted


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_may_be_dropped_doubled_and_swapped(source: Source, models, precision: str) -> None:
    ours, theirs = models[precision].session(), source.checkpoint.model.session()
    prompt = np.array([6, 4])
    pairs = [(ours.start(photos(4, seed=4), prompt), theirs.start(photos(4, seed=4), prompt))]
    moves = [([5, 6, 7, 8], [0, 1, 2, 3]), ([4, 4, 9, 9, 3, 3], [3, 3, 1, 0, 2, 1]), ([7, 5], [4, 0]), ([6, 6], [1, 1])]
    for ids, parents in moves:
        pairs.append((ours.step(np.array(ids), np.array(parents)), theirs.step(np.array(ids), np.array(parents))))
    for a, b in pairs:
        assert a.dtype == np.float32 and a.shape == b.shape
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert cosine.min() > LOGITS[precision]
        if precision.startswith("fp"):
            np.testing.assert_allclose(a, b, atol=2e-4 if precision == "fp32" else 0.05)


def test_a_session_can_be_started_again_and_two_can_take_turns(source: Source, models) -> None:
    model, ids, parents = models["int8"], np.array([5, 6]), np.array([1, 0])
    one, two = photos(2, seed=5), photos(2, seed=6)
    alone = []
    session = model.session()
    for pixels in (one, two):
        alone.append([session.start(pixels), session.step(ids, parents), session.step(parents, parents)])
    a, b = model.session(), model.session()
    mixed = [(a.start(one), b.start(two)), (a.step(ids, parents), b.step(ids, parents))]
    mixed.append((a.step(parents, parents), b.step(parents, parents)))
    for wanted, got in zip(zip(*alone, strict=True), mixed, strict=True):
        np.testing.assert_array_equal(wanted[0], got[0])
        np.testing.assert_array_equal(wanted[1], got[1])


def test_sessions_in_two_threads(source: Source, models) -> None:
    batches = [photos(2, seed=seed) for seed in range(6)]
    wanted = [search(source, models["int8"].session(), pixels, 3) for pixels in batches]
    found: dict[int, list] = {}

    def work(first: int) -> None:
        for index in range(first, len(batches), 2):
            found[index] = search(source, models["int8"].session(), batches[index], 3)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(len(batches))] == wanted


def wrong(artifact: Artifact, part: str, role: str, name: str, **claims) -> dict:
    """The artifact's graphs with one claim about a tensor changed; without claims, the tensor renamed."""
    graphs = copy.deepcopy(artifact.graphs)
    tensors = graphs[part][role]
    if claims:
        tensors[name] |= claims
    else:
        tensors[f"{name}_"] = tensors.pop(name)
    return graphs


def test_a_graph_that_is_not_what_the_manifest_says(
    source: Source, artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    made = artifacts["fp16"]
    logits = made.graphs["decoder"]["outputs"]["logits"]["shape"]
    cases = [
        wrong(made, "encoder", "inputs", "pixels", dtype="int32"),
        wrong(made, "encoder", "inputs", "pixels", shape=["batch", 32, 33, 3]),
        wrong(made, "decoder", "outputs", "logits", shape=[*logits, 1]),
        wrong(made, "decoder", "outputs", "logits", shape=[logits[0], logits[1] + 1]),
        wrong(made, "decoder", "inputs", "ids"),
    ]
    for index, graphs in enumerate(cases):
        with pytest.raises(EdgecapError, match=r"puts are not what bundle.json says \((pixels|logits|ids)") as caught:
            load(source.checkpoint, made, tmp_path / str(index), graphs=graphs)
        assert "\n" not in caught.value.message


def test_broken_files_and_settings_are_one_line(source: Source, artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    made = artifacts["int8"]
    xml, weights = made.files["decoder.xml"], made.files["decoder.bin"]
    broken = [
        ("decoder.xml", b"\x08\x07 no xml"),
        ("decoder.xml", xml[: len(xml) // 2]),
        ("decoder.xml", xml.replace(b'type="MatMul"', b'type="NoSuchOperator"')),
        ("decoder.bin", weights[: len(weights) // 2]),
    ]
    for index, (name, content) in enumerate(broken):
        with pytest.raises(EdgecapError, match=r"decoder.xml (is not an OpenVINO graph|cannot be loaded)") as caught:
            load(
                source.checkpoint, dataclasses.replace(made, files=made.files | {name: content}), tmp_path / str(index)
            )
        assert "\n" not in caught.value.message
    with pytest.raises(EdgecapError, match="session is missing or not OpenVINO's"):
        load(source.checkpoint, made, tmp_path / "kv", session=made.session | {"kv": [{}]})
    from edgecap.runtime.backends.openvino import OpenVinoModel

    manifest = {"graphs": made.graphs, "session": made.session, "tokens": source.checkpoint.tokens}
    with pytest.raises(UsageError, match="threads must be"):
        OpenVinoModel.load(Bundle(tmp_path, manifest), threads=0)


def test_nobody_is_told(tmp_path: Path) -> None:
    """Importing OpenVINO would otherwise send an event and keep an id at home; NNCF asks the same package."""
    code = "import sys, edgecap.runtime, openvino; print(sys.modules['openvino_telemetry'])"
    places = {name: str(tmp_path) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME")}
    env = {name: value for name, value in os.environ.items() if name != "CI"} | places
    done = subprocess.run([sys.executable, "-B", "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None"]
    assert not list(tmp_path.iterdir())


def stored(xml: bytes) -> dict[str, int]:
    """Bytes of a graph's constants by their element type."""
    sizes: dict[str, int] = {}
    for kind, size in re.findall(rb'<data element_type="(\w+)" shape="[^"]*" offset="\d+" size="(\d+)"', xml):
        sizes[kind.decode()] = sizes.get(kind.decode(), 0) + int(size)
    return sizes


def test_the_weights_have_the_bits_that_the_target_names(source: Source, artifacts: dict[str, Artifact]) -> None:
    weights = sum(p.numel() for p in source.checkpoint.model.decoder.parameters() if p.ndim > 1)
    for precision, kind, bits in (("fp16", "f16", 16), ("int8", "i8", 8), ("int4", "i4", 4)):
        sizes = stored(artifacts[precision].files["decoder.xml"])
        assert sizes[kind] >= 0.75 * weights * bits / 8, precision  # what belongs to the photo is in the encoder
        assert sum(sizes.values()) < 1.35 * weights * bits / 8 + 3000  # each weight once, with scales and biases
    for precision in ("int8", "int4"):
        encoder = artifacts[precision].files["encoder.xml"]
        assert encoder.count(b'"FakeQuantize"') >= 4 and stored(encoder)["i8"] > 1000


def test_the_cache_is_inside(source: Source, artifacts: dict[str, Artifact]) -> None:
    made = artifacts["fp16"]
    kv = bool(source.trunk().session.get("kv"))
    assert (made.files["decoder.xml"].count(b'type="ReadValue"') == 4) == kv
    assert ("beam_idx" in made.graphs["decoder"]["inputs"]) == kv and "kv" not in made.session
    assert not any(
        name.startswith(("past", "present")) for role in ("inputs", "outputs") for name in made.graphs["decoder"][role]
    )


def test_layers_may_be_kept_and_graphs_chosen(source: Source, artifacts: dict[str, Artifact]) -> None:
    name = layers_of(Graph(source.trunk().decoder))[1].node.name
    options = BuildOptions(keep=frozenset({f"decoder:{name}"}), graphs={"encoder": "fp32"})
    made = build(Source(source.checkpoint, source.calibration, source.scratch, options, _trunk=source.trunk()), "int4")
    before, after = (stored(each.files["decoder.xml"]) for each in (artifacts["int4"], made))
    assert after["i4"] < before["i4"] and after["i8"] > before.get("i8", 0)
    assert set(stored(made.files["encoder.xml"])) == {"f32", "i64"}


def test_the_bytes_are_the_same_in_another_process(
    source: Source, artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    """And nothing in them tells of versions, folders or the conversion's parameters."""
    (tmp_path / "trunk").write_bytes(pickle.dumps((source.trunk(), source.calibration.pixels)))
    code = """
import pickle, sys
from pathlib import Path
from edgecap.export.artifact import Source
from edgecap.export.calibration import Calibration
from edgecap.export.openvino_graphs import build
folder = Path(sys.argv[1])
trunk, pixels = pickle.loads((folder / "trunk").read_bytes())
source = Source(None, Calibration(pixels, [], {}), folder, _trunk=trunk)
made = {name: build(source, name).files for name in ("fp32", "fp16", "int8", "int4")}
(folder / "made").write_bytes(pickle.dumps(made))
"""
    env = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""  # nncf's tables and progress bars
    again = pickle.loads((tmp_path / "made").read_bytes())
    for precision, made in artifacts.items():
        assert again[precision] == made.files
        for name, content in made.files.items():
            if name.endswith(".xml"):
                assert not re.search(rb"20\d\d\.\d|nncf|conversion_parameters|/tmp", content)
