"""CoreML targets: packages read back, weights compared, programs computed op by op and driven by a session."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools", reason="the CoreML tests need coremltools: pip install 'edgecap[coreml]'")

import torch

from edgecap.export import coreml
from edgecap.export.artifact import Artifact, BuildOptions, Source, size_of
from edgecap.export.coreml_program import Program
from edgecap.export.coreml_weights import compare_weights
from edgecap.runtime.backends import coreml as backend
from edgecap.runtime.decode import DecodeOptions, decode
from edgecap.runtime.errors import EdgecapError, UsageError
from edgecap.train.checkpoint import Checkpoint, load_checkpoint

from .nets import photos, save_run

Build = Callable[..., Artifact]
KINDS = ("gru", "transformer", "llama", "gpt2")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, small: None) -> dict[str, Checkpoint]:
    root = tmp_path_factory.mktemp("runs")
    return {name: load_checkpoint(save_run(root / name, name)) for name in KINDS}


@pytest.fixture(scope="module")
def build(checkpoints: dict[str, Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> Build:
    made: dict[tuple[str, str], Artifact] = {}

    def make(decoder: str, precision: str) -> Artifact:
        if (decoder, precision) not in made:
            scratch = tmp_path_factory.mktemp("scratch")
            made[decoder, precision] = coreml.build(_source(checkpoints[decoder], scratch), precision)
        return made[decoder, precision]

    return make


def _source(checkpoint: Checkpoint, scratch: Path, **options: Any) -> Source:
    return Source(checkpoint, None, scratch, BuildOptions(**options))


def _cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def _bytes(artifact: Artifact) -> int:
    return sum(map(size_of, artifact.files.values()))


# --- the programs, computed op by op, through the session that a Mac would use --------------------------------


@pytest.mark.parametrize("decoder", KINDS)
def test_rows_dropped_doubled_and_reordered_across_photos(
    decoder: str, build: Build, checkpoints: dict[str, Checkpoint]
) -> None:
    ours, theirs = build(decoder, "fp16").simulate().session(), checkpoints[decoder].model.session()
    pixels, random = photos(3), np.random.default_rng(0)
    rows = len(pixels)
    pairs = [(ours.start(pixels, np.array([5, 7])), theirs.start(pixels, np.array([5, 7])))]
    for count in (5, 5, 2, 7):  # photos' rows end up mixed, and some photos gone
        parents = random.integers(0, rows, count)
        ids = random.integers(3, 20, count)
        pairs.append((ours.step(ids, parents), theirs.step(ids, parents)))
        rows = count
    for found, expected in pairs:
        assert found.dtype == np.float32 and found.shape == expected.shape
        assert _cosine(found, expected) > 0.9999
        np.testing.assert_allclose(found, expected, atol=0.01 * np.abs(expected).max())


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("decoder", KINDS)
def test_the_same_captions_as_torch_in_a_batch_and_one_by_one(
    decoder: str, beam: int, build: Build, checkpoints: dict[str, Checkpoint]
) -> None:
    model, checkpoint = build(decoder, "fp16").simulate(), checkpoints[decoder]
    pixels, options = photos(4), DecodeOptions(beam=beam, max_length=8)

    def captions(session: Any, pixels: np.ndarray) -> list[list[tuple[int, ...]]]:
        found = decode(session, pixels, options, eos_id=checkpoint.tokens["eos"])
        return [[hypothesis.token_ids for hypothesis in each] for each in found]

    batch = captions(model.session(), pixels)
    assert batch == captions(checkpoint.model.session(), pixels)
    assert batch == [captions(model.session(), pixels[i : i + 1])[0] for i in range(len(pixels))]


def test_two_sessions_of_one_model_do_not_disturb_each_other(build: Build) -> None:
    model = build("llama", "fp16").simulate()
    alone, first, second = (model.session() for _ in range(3))
    expected = [alone.start(photos(1)), alone.step(np.array([5]), np.array([0]))]
    found = [first.start(photos(1))]
    second.start(photos(2, seed=1))
    second.step(np.array([9, 9]), np.array([0, 1]))
    found.append(first.step(np.array([5]), np.array([0])))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_recurrent_step_of_more_rows_than_the_program_takes_is_run_in_parts(build: Build) -> None:
    whole, parts = build("gru", "fp16").simulate(), build("gru", "fp16").simulate()
    parts.roles = {**parts.roles, "rows": 2}
    sessions = [whole.session(), parts.session()]
    for session in sessions:
        session.start(photos(1))
    for ids, parents in (([4, 5, 6, 7, 8], [0] * 5), ([3, 4, 5], [4, 0, 2])):
        one, other = (session.step(np.array(ids), np.array(parents)) for session in sessions)
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_full_cache_is_one_line_saying_what_to_do(build: Build) -> None:
    session = build("llama", "fp16").simulate().session()
    session.start(photos(1))
    with pytest.raises(UsageError, match="KV cache of .* use a smaller beam or max_length"):
        for _ in range(1000):
            session.step(np.full(8, 5), np.zeros(8, np.int64))


# --- what the packages hold -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("decoder", "precision", "closest"), [("llama", "int8", 0.99), ("gru", "int4", 0.9)])
def test_every_weight_is_the_checkpoints_as_near_as_the_precision_allows(
    decoder: str,
    precision: str,
    closest: float,
    build: Build,
    checkpoints: dict[str, Checkpoint],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(coreml, "LARGE", 128)  # the nets here are small
    monkeypatch.setattr(coreml, "BLOCKS", (16, 8))
    artifact = build(decoder, precision)
    for result in artifact.passes:
        cost = result.cost
        assert cost["weights"] == cost["exact"] + cost["rounded"] + cost["linear"]
        assert cost["linear"] > 0 and cost["worst_relative_rms"] < (0.02 if precision == "int8" else 0.15)
    for _, _, value, stored in artifact.simulate().decoder.weights():
        if value.ndim > 1 and value.size > 128:
            assert stored.op_type.startswith("constexpr_")
            assert precision == "int8" or stored.data.dtype.get_bitwidth() == 4  # in blocks of 16 or of 8
    assert _bytes(artifact) < _bytes(build(decoder, "fp16"))
    found, expected = artifact.simulate().session(), checkpoints[decoder].model.session()
    assert _cosine(found.start(photos(4)), expected.start(photos(4))) > closest


@pytest.mark.parametrize("decoder", KINDS)
def test_half_precision_is_the_checkpoint_rounded_to_the_last_bit(decoder: str, build: Build) -> None:
    for result in build(decoder, "fp16").passes:
        assert result.cost["weights"] > 4
        assert result.cost["exact"] + result.cost["rounded"] == result.cost["weights"]
        assert result.params["graph"] == "encoder" or result.cost["rounded"] == 0


def test_a_weight_that_is_not_the_checkpoints_is_found(build: Build, checkpoints: dict[str, Checkpoint]) -> None:
    model = build("gru", "fp16").simulate()
    decoder = checkpoints["gru"].model.decoder
    compare_weights(model.decoder, decoder)
    other = load_checkpoint(checkpoints["gru"].path).model.decoder
    with torch.no_grad():
        other.query.weight[3, 3] += 0.01
    with pytest.raises(EdgecapError, match="that is no weight of the checkpoint"):
        compare_weights(model.decoder, other)


@pytest.mark.parametrize(("decoder", "version"), [("gru", 7), ("llama", 9), ("transformer", 9)])
def test_the_specification_says_what_the_manifest_says(decoder: str, version: int, build: Build) -> None:
    artifact = build(decoder, "fp16")
    encoder = artifact.graphs["encoder"]
    assert encoder["inputs"] == {"image": {"dtype": "uint8", "shape": [1, 32, 32, 3]}}
    model = artifact.simulate()
    for program in (model.encoder, model.decoder):
        assert program.spec.specificationVersion == version  # iOS 16 and iOS 18
        assert not program.spec.description.metadata.userDefined
    graph, roles = artifact.graphs["decoder"], artifact.more["coreml"]
    if decoder == "gru":
        assert graph["inputs"]["ids"] == {"dtype": "int32", "shape": ["1..64"]}
        assert set(graph["inputs"]) == {"ids", *roles["photo"], *(each["input"] for each in roles["state"])}
    else:
        seen = {"words", "prefix"} if decoder == "llama" else {f"cross_{part}_{i}" for i in range(2) for part in "kv"}
        assert set(graph["inputs"]) == {"ids", *seen, "positions", "mask", "wanted"}
        heads = 2 if decoder == "llama" else 4
        assert graph["states"]["keys"] == {"dtype": "float16", "shape": [2, heads, roles["slots"], 8]}
        assert graph["inputs"]["mask"]["shape"] == [1, 1, f"1..{roles['slots']}", f"1..{roles['slots']}"]
    assert graph["outputs"]["logits"]["dtype"] == "float32"


EXPORT = """
import sys, hashlib
from pathlib import Path
from edgecap.train.models.encoders import ENCODERS
from tests.export.nets import small_encoder
from edgecap.train.checkpoint import load_checkpoint
from edgecap.export import coreml
from edgecap.export.artifact import Source
ENCODERS["small"] = small_encoder
scratch = Path(sys.argv[2])
scratch.mkdir()
coreml.LARGE = 128
artifact = coreml.build(Source(load_checkpoint(Path(sys.argv[1])), None, scratch), "int8")
print([(n, hashlib.sha256(Path(f).read_bytes()).hexdigest()) for n, f in sorted(artifact.files.items())])
"""


def test_a_fresh_process_makes_the_same_bytes(
    build: Build, checkpoints: dict[str, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    monkeypatch.setattr(coreml, "LARGE", 128)
    here = build("llama", "int8")
    names = {f"{part}.mlpackage/{name}" for part in ("encoder", "decoder") for name in PACKAGE}
    assert set(here.files) == names
    command = [sys.executable, "-c", EXPORT, str(checkpoints["llama"].path), str(tmp_path / "scratch")]
    root = Path(__file__).parents[2]
    said = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    expected = [(n, hashlib.sha256(Path(f).read_bytes()).hexdigest()) for n, f in sorted(here.files.items())]
    assert said.stdout.strip() == str(expected)
    assert said.stderr == ""


PACKAGE = (
    "Manifest.json",
    "Data/com.apple.CoreML/model.mlmodel",
    "Data/com.apple.CoreML/weights/weight.bin",
)


# --- the backend ----------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(build: Build, tmp_path: Path) -> Callable[[str], SimpleNamespace]:
    """What the backend uses of a Bundle: the packages on disk and a manifest that may be changed."""

    def make(decoder: str) -> SimpleNamespace:
        artifact = build(decoder, "fp16")
        for name, file in artifact.files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(Path(file).read_bytes())
        parts = {"files": dict.fromkeys(artifact.files, {}), "graphs": artifact.graphs, "tokens": {"bos": 1}}
        manifest = json.loads(json.dumps({**parts, **artifact.more}))
        return SimpleNamespace(path=tmp_path, manifest=manifest, read=lambda name: (tmp_path / name).read_bytes())

    return make


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac runs them")
def test_elsewhere_than_on_a_mac_it_is_one_line(bundle: Callable[[str], Any]) -> None:
    with pytest.raises(UsageError, match="run on macOS and iOS only: copy it to a Mac") as caught:
        backend.CoreMLModel.load(bundle("gru"))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("decoder", ["gru", "transformer", "llama"])
def test_load_as_on_a_mac_with_the_program_computed_here(
    decoder: str, bundle: Callable[[str], Any], checkpoints: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(backend, "open_package", Program)
    session = backend.CoreMLModel.load(bundle(decoder), threads=1).session()
    found = session.start(photos(2))
    monkeypatch.undo()
    assert _cosine(found, checkpoints[decoder].model.session().start(photos(2))) > 0.9999


def _rename_input(manifest: dict[str, Any], root: Path) -> None:
    manifest["graphs"]["decoder"]["inputs"]["other"] = manifest["graphs"]["decoder"]["inputs"].pop("h")


def _outside(manifest: dict[str, Any], root: Path) -> None:
    path = root / "encoder.mlpackage" / "Manifest.json"
    path.write_text(path.read_text().replace("com.apple.CoreML/weights", "../../../../weights"))


def _external(manifest: dict[str, Any], root: Path) -> None:
    path = root / "decoder.mlpackage" / PACKAGE[1]
    path.write_bytes(path.read_bytes().replace(b"@model_path/weights/weight.bin", b"@model_path/weights/../../xbin"))


def _damaged(manifest: dict[str, Any], root: Path) -> None:
    (root / "decoder.mlpackage" / PACKAGE[1]).write_bytes(b"\xff" * 100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"photo": None}, "coreml.prefix is missing"),
        ({"photo": ["cross_k_0"]}, "coreml.photo is missing"),
        ({"prefix": 3}, "coreml.prefix is missing"),
        ({"slots": 0}, "coreml.slots is missing"),
    ],
)
def test_roles_of_slots_that_a_session_cannot_use_are_refused(change: dict[str, Any], message: str) -> None:
    roles = {"decoder": "slots", "image": "image", "logits": "logits", "rows": 64, "slots": 128, "positions": 128}
    roles |= {"photo": {"cross_k_0": "cross_k_0"}}
    opened: Any = SimpleNamespace(path=Path("x"), manifest={"coreml": roles})
    assert backend.check_roles(opened) == roles
    roles |= change
    if roles["photo"] is None:
        del roles["photo"]
    with pytest.raises(EdgecapError, match=message):
        backend.check_roles(opened)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest, root: manifest.pop("coreml"), "coreml is missing"),
        (lambda manifest, root: manifest["coreml"].update(decoder="tree"), 'must be "recurrent" or "slots"'),
        (
            lambda manifest, root: manifest["coreml"].update(state=[{"input": 3}]),
            "coreml.state is missing or malformed",
        ),
        (lambda manifest, root: manifest["coreml"].update(rows=0), "coreml.rows is missing or malformed"),
        (_rename_input, "its inputs are not what bundle.json says"),
        (_outside, "which is not a file of the bundle"),
        (_external, "keeps weights in @model_path/weights/../../xbin"),
        (_damaged, "cannot be read"),
    ],
)
def test_a_package_that_is_not_what_it_should_be_is_refused_before_core_ml_sees_it(
    change: Callable[..., Any], message: str, bundle: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = bundle("gru")
    change(opened.manifest, opened.path)
    monkeypatch.setattr(sys, "platform", "darwin")
    loaded: list[Path] = []
    monkeypatch.setattr(backend, "open_package", lambda path: loaded.append(path))
    with pytest.raises(EdgecapError, match=message) as caught:
        backend.CoreMLModel.load(opened)
    assert "\n" not in caught.value.message and Path("decoder.mlpackage") not in [
        p.relative_to(opened.path) for p in loaded
    ]


def test_a_failure_inside_core_ml_is_one_line() -> None:
    class Broken:
        def predict(self, data: Any, state: Any = None) -> Any:
            raise RuntimeError("E5RT:\n error 13")

    model = backend.CoreMLModel({"image": "image"}, 1, Broken(), Broken())
    with pytest.raises(EdgecapError, match="Core ML failed in the bundle's program: E5RT: error 13"):
        model.session().start(photos(1))
