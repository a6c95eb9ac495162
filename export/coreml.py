"""Targets coreml-fp16, coreml-int8 and coreml-int4: two .mlpackage folders through torch.jit.trace and coremltools.

Core ML runs on Apple's systems only. What can be known elsewhere is checked here: the packages are read back, every
weight is compared with torch's, and for the gate the programs are computed op by op (coreml_program).
"""

from __future__ import annotations

import json
import uuid
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.backends.coreml import CoreMLModel
from ..runtime.decode import MAX_BEAM
from ..runtime.errors import EdgecapError
from ..train.quiet import quiet
from .artifact import Artifact, Source
from .coreml_program import Program
from .coreml_weights import compare_weights
from .graph import PassResult

if TYPE_CHECKING:
    from ..train.models import CaptionModel, GraphPair

LARGE = 2048  # weights of fewer values stay fp16: they are biases, norms and the smallest depthwise filters
# Weights that share a scale in 4 bits; where 32 does not divide a matrix's rows 16, and where neither does, 8 bits.
# On the Flickr8k captioner (60 photos, 7 steps) the divergence of the next word's distribution from torch's was 0.0044
# for blocks of 16 (4.50 MB), 0.0054 for 32 (4.30 MB) and 0.0067 for k-means palettes (4.09 MB), whose search takes as
# long as the rest of the export; with convolutions in 4 bits, too, every fourth word changed.
BLOCKS = (32, 16)
PROMPT_ROOM = 32  # tokens of a prompt that the KV cache has room for
WIDE_BEAM = 8  # beams for which the KV cache has room at the bundle's max_length
# iOS 18 and macOS 15 brought states and blocks of 4 bits; what needs neither also runs on iOS 16 and macOS 13.
SYSTEMS = {"iOS16": "iOS 16, macOS 13", "iOS18": "iOS 18, macOS 15"}


def fp16(source: Source) -> Artifact:
    return build(source, "fp16")


def int8(source: Source) -> Artifact:
    return build(source, "int8")


def int4(source: Source) -> Artifact:
    return build(source, "int4")


def build(source: Source, precision: str) -> Artifact:
    """Encoder and decoder as Core ML programs, checked. Raises EdgecapError where one cannot be made or is wrong."""
    model = source.checkpoint.model
    pair = model.graphs()
    wanted = {
        part: source.options.graphs.get(part, precision).replace("fp32", "fp16") for part in ("encoder", "decoder")
    }
    slots = "kv" in pair.session
    target = "iOS18" if slots or "int4" in wanted.values() else "iOS16"
    files: dict[str, bytes | Path] = {}
    programs, passes, graphs = {}, [], {}
    with quiet():
        roles = _roles(source, pair)
        for number, (part, kind) in enumerate(wanted.items()):
            source.progress("graphs", number, 2)
            module, described = _encoder(model, pair) if part == "encoder" else _decoder(model, pair, roles)
            package = source.scratch / f"{part}.mlpackage"
            converted = compress(convert(module, described, target), kind)
            converted.save(str(package))
            normalise(package, f"edgecap {part}, {kind}, for {SYSTEMS[target]} or newer")
            programs[part] = Program(package)
            cost = compare_weights(programs[part], module)
            passes.append(PassResult("coreml", {"graph": part, "precision": kind, "target": target}, cost))
            graphs[part] = _manifest(programs[part], part, model)
            files |= _files(package)
    source.progress("graphs", 2, 2)
    bos = source.checkpoint.tokens["bos"]
    return Artifact(
        files=files,
        graphs=graphs,
        session=None,
        requires={"coremltools": "8.1"},
        passes=passes,
        more={"coreml": {**roles, "systems": SYSTEMS[target]}},
        simulate=lambda: CoreMLModel(roles, bos, programs["encoder"], programs["decoder"]),
    )


# --- torch → Core ML ---------------------------------------------------------------------------------------------


def _roles(source: Source, pair: GraphPair) -> dict[str, Any]:
    """The manifest's "coreml": how a session wires the two programs."""
    roles: dict[str, Any] = {"image": "image", "logits": pair.session["logits"], "rows": MAX_BEAM}
    if "kv" not in pair.session:
        return {"decoder": "recurrent", **roles, "photo": pair.session["photo"], "state": pair.session["state"]}
    decoder = source.checkpoint.model.decoder
    seen: dict[str, Any] = {"photo": pair.session["photo"]} if "photo" in pair.session else {}
    cells = 0
    if "prefix" in pair.session:
        seen["prefix"] = pair.session["prefix"]["from"]
        cells = _shapes(pair)[seen["prefix"]][1]
    longest = int(source.checkpoint.recipe.to_dict()["decoding"].get("max_length", 24))
    room = cells + PROMPT_ROOM + WIDE_BEAM * longest
    slots = max(decoder.max_positions, -(-room // 64) * 64)
    return {"decoder": "slots", **roles, **seen, "slots": slots, "positions": decoder.max_positions}


def _shapes(pair: GraphPair) -> dict[str, tuple[int, ...]]:
    """The encoder's outputs for one photo."""
    import torch

    pixels, _ = pair.encoder_inputs["pixels"]
    with torch.no_grad():
        return {n: tuple(v.shape) for n, v in zip(pair.encoder_outputs, pair.encoder(pixels[:1]), strict=True)}


def _encoder(model: CaptionModel, pair: GraphPair) -> tuple[Any, dict[str, Any]]:
    """The encoder module and the arguments of ct.convert that describe it."""
    import coremltools as ct
    import torch

    from .coreml_torch import ImageEncoder

    shape = (1, 3, *model.size)
    image = ct.ImageType("image", shape=shape, color_layout=ct.colorlayout.RGB)
    outputs = [ct.TensorType(name, dtype=np.float16) for name in pair.encoder_outputs]
    example = (torch.zeros(shape),)
    return ImageEncoder(pair.encoder).eval(), {"example": example, "inputs": [image], "outputs": outputs}


def _decoder(model: CaptionModel, pair: GraphPair, roles: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The decoder module and the arguments of ct.convert that describe it."""
    import coremltools as ct
    import torch

    from .coreml_torch import STATES, PhotoSlots, PrefixSlots, RecurrentStep, SlotDecoder

    half, whole, tensor = np.float16, np.int32, ct.TensorType
    rows = ct.RangeDim(1, roles["rows"], 1)
    logits = tensor(roles["logits"], dtype=np.float32)
    if roles["decoder"] == "recurrent":
        # One photo: its tensors are as the encoder makes them. Its rows: as many as there are beams.
        state = [each["input"] for each in roles["state"]]
        inputs, example = [tensor("ids", shape=(rows,), dtype=whole)], [torch.ones(3, dtype=torch.int32)]
        shapes = _shapes(pair)
        for name, source in roles["photo"].items():
            inputs.append(tensor(name, shape=shapes[source], dtype=half))
            example.append(torch.zeros(shapes[source]))
        for each in roles["state"]:
            inputs.append(tensor(each["input"], shape=(rows, *shapes[each["init"]][1:]), dtype=half))
            example.append(torch.zeros(3, *shapes[each["init"]][1:]))
        outputs = [logits, *(tensor(each["output"], dtype=half) for each in roles["state"])]
        described = {"example": tuple(example), "inputs": inputs, "outputs": outputs}
        return RecurrentStep(model.decoder, roles["photo"], state).eval(), described
    decoder, slots = model.decoder, roles["slots"]
    length, end = ct.RangeDim(1, slots, 1), ct.RangeDim(1, slots, 1)
    prefix: dict[str, Any] = {}
    photo: dict[str, Any] = {}
    if "prefix" in roles:
        module: SlotDecoder = PrefixSlots(decoder, slots).eval()
        prefix["words"] = ((1, length, 1), half, torch.ones(1, 5, 1))
        prefix["prefix"] = ((1, length, decoder.dim), half, torch.zeros(1, 5, decoder.dim))
    else:
        module = PhotoSlots(decoder, slots).eval()
        for name, source in roles["photo"].items():
            shape = _shapes(pair)[source]
            photo[name] = (shape, half, torch.zeros(shape))
    given = {  # name → (shape, dtype, example of 5 new tokens after 4)
        "ids": ((1, length), whole, torch.ones(1, 5, dtype=torch.int32)),
        **prefix,
        "positions": ((1, length), whole, torch.arange(5, dtype=torch.int32).unsqueeze(0)),
        "mask": ((1, 1, length, end), half, torch.zeros(1, 1, 5, 9)),
        "wanted": ((rows,), whole, torch.tensor([1, 2, 4], dtype=torch.int32)),
        **photo,
    }
    shape = getattr(module, STATES[0]).shape
    return module, {
        "example": tuple(example for _, _, example in given.values()),
        "inputs": [tensor(name, shape=shape, dtype=dtype) for name, (shape, dtype, _) in given.items()],
        "outputs": [logits],
        "states": [ct.StateType(tensor(shape=shape, dtype=half), name=name) for name in STATES],
    }


def convert(module: Any, described: dict[str, Any], target: str) -> Any:
    """A torch module → coremltools' MLModel in fp16. Raises EdgecapError where coremltools cannot."""
    import coremltools as ct
    import torch

    arguments = dict(described)
    example = arguments.pop("example")
    try:
        with torch.no_grad():
            traced = torch.jit.trace(module, example, check_trace=False)
            for state in arguments.get("states", []):
                module.get_buffer(state.name).zero_()  # the trace wrote into it
        return ct.convert(
            traced,
            **arguments,
            minimum_deployment_target=getattr(ct.target, target),
            compute_precision=ct.transform.FP16ComputePrecision(op_selector=_fits_half),
            skip_model_load=True,
        )
    except Exception as error:  # torch's and coremltools' exceptions share no base class
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise EdgecapError(f"coremltools cannot convert {type(module).__name__}: {lines[-1][:200]}") from error


def _fits_half(op: Any) -> bool:
    """False for powers, which overflow fp16 (65504) in large models, and for the mean and root that RMSNorm takes of
    them: these stay fp32, as in torch."""
    chain = {"reduce_mean": "pow", "add": "reduce_mean", "rsqrt": "add"}  # what each follows in RMSNorm
    while op is not None and op.op_type in chain:
        before = op.x.op
        if before is None or before.op_type != chain[op.op_type]:
            return True
        op = before
    return op is None or op.op_type != "pow"


def compress(converted: Any, precision: str) -> Any:
    """The same program with its large weights in 8 bits, or in 4 with convolutions in 8.

    4 bits are blocks with a scale each, not palettes: see BLOCKS.
    """
    from coremltools.optimize import coreml as cto

    if precision == "fp16":
        return converted
    common = {"mode": "linear_symmetric", "weight_threshold": LARGE}
    bytewise = cto.OpLinearQuantizerConfig(**common, dtype="int8")
    if precision == "int4":
        for block in BLOCKS:
            four = cto.OpLinearQuantizerConfig(**common, dtype="int4", granularity="per_block", block_size=block)
            config = cto.OptimizationConfig(four, op_type_configs={"conv": bytewise})
            converted = cto.linear_quantize_weights(converted, config)
            if not _wide_matrices(converted):
                return converted
    return cto.linear_quantize_weights(converted, cto.OptimizationConfig(bytewise))


def _wide_matrices(converted: Any) -> bool:
    """Whether a large matrix is still multiplied as it was stored."""
    (block,) = converted.get_spec().mlProgram.functions["main"].block_specializations.values()
    large = set()
    for op in block.operations:
        if op.type == "const":
            sizes = [axis.constant.size for axis in op.outputs[0].type.tensorType.dimensions]
            if len(sizes) > 1 and prod(sizes) > LARGE:
                large.add(op.outputs[0].name)
    products = (op for op in block.operations if op.type in ("linear", "matmul"))
    return any(each.name in large for op in products for given in op.inputs.values() for each in given.arguments)


# --- the package as files ----------------------------------------------------------------------------------------

PARTS = {"model.mlmodel": "CoreML Model Specification", "weights": "CoreML Model Weights"}


def normalise(package: Path, description: str) -> None:
    """Rewrite what changes from run to run: dates, random identifiers, the order of maps."""
    import coremltools as ct

    path = package / "Data" / "com.apple.CoreML" / "model.mlmodel"
    spec = ct.utils.load_spec(str(package))
    spec.description.metadata.Clear()
    spec.description.metadata.shortDescription = description
    path.write_bytes(spec.SerializeToString(deterministic=True))
    ids = {name: str(uuid.uuid5(uuid.NAMESPACE_OID, f"edgecap/{name}")) for name in PARTS}
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            ids[name]: {
                "author": "com.apple.CoreML",
                "description": text,
                "name": name,
                "path": f"com.apple.CoreML/{name}",
            }
            for name, text in PARTS.items()
        },
        "rootModelIdentifier": ids["model.mlmodel"],
    }
    (package / "Manifest.json").write_text(json.dumps(manifest, indent=4) + "\n")


def _files(package: Path) -> dict[str, bytes | Path]:
    """Every file of the folder by its name in the bundle."""
    found = (path for path in sorted(package.rglob("*")) if path.is_file())
    return {f"{package.name}/{path.relative_to(package).as_posix()}": path for path in found}


def _manifest(program: Program, part: str, model: CaptionModel) -> dict[str, Any]:
    """This graph's entry in the manifest, from the package's own description."""
    described: dict[str, Any] = {"file": f"{part}.mlpackage"}
    for role in ("input", "output", "state"):
        entries = {}
        for feature in getattr(program.spec.description, role):
            kind = feature.type.WhichOneof("Type")
            if kind == "imageType":
                entries[feature.name] = {"dtype": "uint8", "shape": [1, *model.size, 3]}
                continue
            array = feature.type.stateType.arrayType if kind == "stateType" else feature.type.multiArrayType
            entries[feature.name] = {"dtype": _DTYPES[array.dataType], "shape": _sizes(array)}
        if entries or role != "state":
            described[f"{role}s"] = entries
    return described


_DTYPES = {65552: "float16", 65568: "float32", 131104: "int32"}  # ArrayFeatureType.ArrayDataType


def _sizes(array: Any) -> list[int | str]:
    """The shape; a flexible axis as its range, "1..64"."""
    if array.WhichOneof("ShapeFlexibility") != "shapeRange":
        return [int(size) for size in array.shape]
    spans = [(int(span.lowerBound), int(span.upperBound)) for span in array.shapeRange.sizeRanges]
    return [low if low == high else f"{low}..{high}" for low, high in spans]
