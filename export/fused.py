"""The whole captioner as one ONNX graph: any RGB picture in, the best caption's ids, log-probability and text out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from ..runtime.decode import MAX_BEAM, MAX_LENGTH, DecodeOptions, never_said
from ..runtime.errors import EdgecapError
from ..runtime.preprocess import Preprocess
from .fused_build import FLOAT, INT64, Scope, inline, value
from .fused_loop import Body, Decoder, Rules, beam, greedy
from .graph import PassResult, join, save
from .trunk import OnnxPair

if TYPE_CHECKING:
    from ..runtime.tokenizer import Tokenizer
    from ..train.checkpoint import Checkpoint
    from .artifact import Artifact

FILE = "fused.onnx"
OPSET_TEXT = 20  # the first with StringConcat
IR_VERSION = 10
PROBES = 200  # id sequences whose text is checked
CHANGED = {"GroupNormalization", "GridSample", "DFT"}  # operators whose meaning changed between opsets 18 and 23


def fuse(
    pair: OnnxPair,
    *,
    tokens: Mapping[str, int],
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    decoding: Mapping[str, Any],
) -> onnx.ModelProto:
    """Merge finished (also quantized) encoder and decoder graphs, resizing and search into one graph.

    Inputs: image uint8 [height, width, 3], RGB of any size; beam int64 [], 1 is greedy; max_length int64 [], which may
    be left out. Outputs: ids int64 [length] without BOS and EOS, logprob float [], and text string [1] where string
    operators can do what the tokenizer does (not for a tokenizer that rewrites text across tokens).
    The search is runtime/decode.py's with `decoding`, of which min_length, length_penalty and no_repeat_ngram are
    fixed here. beam is clipped to 1–64, max_length to 1–4096. Raises EdgecapError for graphs it cannot merge.
    """
    options = DecodeOptions.from_dict(dict(decoding))
    pieces = text_pieces(tokenizer, tokens)
    models = (pair.encoder, pair.decoder)
    opset = max(*(_opset(model) for model in models), OPSET_TEXT if pieces else 0)
    for model in models:
        _check_meaning(model, opset)

    main = Scope()
    (pixels,) = (each.name for each in pair.encoder.graph.input)
    width = _clipped(main, "beam", MAX_BEAM)
    longest = _clipped(main, "max_length", MAX_LENGTH)
    batch = _batch(main, width, preprocess)
    given = {pixels: _resize(main, batch, preprocess)}
    photo = inline(pair.encoder, given, main, "encoder/", weights="encoder/")
    decoder = Decoder(pair.decoder, pair.session, photo, tokens["vocab_size"])
    rules = Rules(options, tokens["bos"], tokens["eos"], never_said(tokens))

    alone = main("Equal", main("Squeeze", width), main.constant(1))
    # Both loops lie in the main graph, and one of them makes no step: in the branches of an If, ONNX Runtime would pack
    # the weights anew at every step. It looks for constants only one graph further out.
    none = main.constant([0])
    steps = main("Where", alone, longest, none)
    greedy_ids, greedy_logprob = greedy(main, decoder, rules, steps)
    beam_ids, beam_logprob = beam(main, decoder, rules, width, longest, main("Where", alone, none, longest))
    ids = main("Concat", greedy_ids, beam_ids, axis=0)
    logprob = main("Cast", main("Where", alone, greedy_logprob, beam_logprob), to=FLOAT)
    outputs = [("ids", ids, INT64, ["length"]), ("logprob", logprob, FLOAT, [])]
    if pieces:
        outputs.append(("text", _text(main, ids, *pieces), TensorProto.STRING, [1]))
    for name, source, _, _ in outputs:
        main.nodes.append(helper.make_node("Identity", [source], [name], name=name))
    default = onnx.numpy_helper.from_array(np.array(options.max_length, np.int64), "max_length")
    graph = helper.make_graph(
        main.nodes,
        "graph",
        [
            value("image", TensorProto.UINT8, ["height", "width", 3]),
            value("beam", INT64, []),
            value("max_length", INT64, []),
        ],
        [value(name, kind, shape) for name, _, kind, shape in outputs],
        [*main.initializers.values(), default],
        value_info=[value(batch, TensorProto.UINT8, ["photos", "tall", "wide", 3])],
    )
    domains = {entry.domain: entry.version for model in models for entry in model.opset_import if entry.domain}
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(*entry) for entry in sorted(domains.items()))]
    version = max(IR_VERSION, *(model.ir_version for model in models))
    model = helper.make_model(graph, opset_imports=imports, ir_version=version, producer_name="edgecap")
    onnx.checker.check_model(model)
    return model


def _opset(model: onnx.ModelProto) -> int:
    return next(entry.version for entry in model.opset_import if not entry.domain)


def _check_meaning(model: onnx.ModelProto, opset: int) -> None:
    """From 18 on newer opsets only add types and attributes whose defaults are the old meaning, but for a few."""
    changed = sorted({node.op_type for node in model.graph.node} & CHANGED)
    if _opset(model) != opset and changed:
        raise EdgecapError(f"--fused cannot bring {', '.join(changed)} from opset {_opset(model)} to {opset}")


def add_fused(artifact: Artifact, checkpoint: Checkpoint) -> None:
    """Put fused.onnx, made of the artifact's own encoder and decoder graphs, into an ONNX artifact.

    Raises EdgecapError for graphs it cannot merge.
    """
    models = []
    for part in ("encoder", "decoder"):
        graph = artifact.graphs[part]
        files = [artifact.files[graph[role]] for role in ("file", "weights") if role in graph]
        models.append(join(*(file if isinstance(file, bytes) else file.read_bytes() for file in files)))
    assert artifact.session is not None  # ONNX Runtime's artifacts have one
    model = fuse(
        OnnxPair(models[0], models[1], artifact.session, []),
        tokens=checkpoint.tokens,
        preprocess=checkpoint.preprocess,
        tokenizer=checkpoint.tokenizer,
        decoding=checkpoint.recipe.to_dict()["decoding"],
    )
    artifact.files[FILE] = save(model)
    artifact.graphs["fused"] = describe(model)
    text = "text" in artifact.graphs["fused"]["outputs"]
    artifact.passes.append(
        PassResult("fused", {"opset": _opset(model), "text": text}, {"nodes": len(model.graph.node)})
    )


def describe(model: onnx.ModelProto) -> dict[str, Any]:
    """The manifest's "graphs.fused". max_length is left out: it has a default and engines do not list it."""
    dtypes = {TensorProto.UINT8: "uint8", INT64: "int64", FLOAT: "float32", TensorProto.STRING: "string"}
    optional = {tensor.name for tensor in model.graph.initializer}

    def tensors(values: Any) -> dict[str, Any]:
        kinds = {each.name: each.type.tensor_type for each in values if each.name not in optional}
        return {
            name: {"dtype": dtypes[kind.elem_type], "shape": [dim.dim_param or dim.dim_value for dim in kind.shape.dim]}
            for name, kind in kinds.items()
        }

    return {"file": FILE, "inputs": tensors(model.graph.input), "outputs": tensors(model.graph.output)}


def _clipped(main: Scope, name: str, high: int) -> str:
    """The scalar input `name` as int64 [1] in 1–high."""
    within = main("Min", main("Max", name, main.constant(1)), main.constant(high))
    return main("Reshape", within, main.constant([1]))


# --- pixels -----------------------------------------------------------------------------------------


def _batch(main: Scope, width: str, preprocess: Preprocess) -> str:
    """image → uint8 [1, h, w, 3], cropped where the preprocessing is.

    The 1 is kept from the engine by computing it from an input. ONNX Runtime would turn the MatMuls of a single photo
    into Gemms, and then no longer fuse their quantization.
    """
    image = "image" if preprocess.mode == "squash" else _crop(main, "image", *preprocess.size)
    one = main("Min", width, main.constant([1]))
    return main("Reshape", image, main("Concat", one, main("Shape", image), axis=0))


def _resize(main: Scope, batch: str, preprocess: Preprocess) -> str:
    """uint8 [1, h, w, 3] → uint8 [1, H, W, 3] as Pillow resizes it: antialiased, in 8-bit fixed point, rows first."""
    cubic = {"mode": "cubic", "cubic_coeff_a": -0.5} if preprocess.resample == "bicubic" else {"mode": "linear"}
    return main(
        "Resize",
        batch,
        "",
        "",
        main.constant(preprocess.size),
        axes=[1, 2],
        antialias=1,
        exclude_outside=1,
        coordinate_transformation_mode="half_pixel",
        **cubic,
    )


def _crop(main: Scope, image: str, height: int, width: int) -> str:
    """The largest centred part of the target's aspect ratio; where Pillow cuts through a pixel, all of it."""
    zero = main.constant([0])
    tall, wide = (main("Shape", image, start=axis, end=axis + 1) for axis in (0, 1))  # [1] each
    across, down = main("Mul", wide, main.constant([height])), main("Mul", tall, main.constant([width]))
    top = main("Div", main("Max", main("Sub", down, across), zero), main.constant([2 * width]))
    left = main("Div", main("Max", main("Sub", across, down), zero), main.constant([2 * height]))
    starts = main("Concat", top, left, axis=0)
    ends = main("Concat", main("Sub", tall, top), main("Sub", wide, left), axis=0)
    return main("Slice", image, starts, ends, main.constant([0, 1]))


# --- text -------------------------------------------------------------------------------------------


def text_pieces(tokenizer: Tokenizer, tokens: Mapping[str, int]) -> tuple[list[str], list[bool], bool] | None:
    """What each id adds to a text, and whether behind a space: ([vocab], [vocab]), and whether all do so, as words do.

    None where that is not enough to write a text.
    Taken from the tokenizer itself: the text of two ids less that of the first. It is enough if random sequences of
    ids read as the pieces joined (runtime/tokenizer.py's `decode`). What no caption should have is left out of that:
    control characters, and single bytes of a character, which read as "\ufffd" each in the graph's text.
    """
    inner, vocab = tokenizer.inner, tokens["vocab_size"]
    special = {*never_said(tokens), tokens["eos"]}
    plain = [each for each in range(vocab) if each not in special and inner.decode([each])]
    first = next((each for each in plain if inner.decode([each]).isalnum() and inner.decode([each]).isascii()), None)
    if first is None:
        return None
    before = inner.decode([first], skip_special_tokens=True)
    both = inner.decode_batch([[first, each] for each in range(vocab)], skip_special_tokens=True)
    if not all(each.startswith(before) for each in both):
        return None
    added = [each.removeprefix(before) for each in both]
    words, spaced = [each.removeprefix(" ") for each in added], [each.startswith(" ") for each in added]
    whole = np.array([each for each in plain if added[each].isprintable() and "\ufffd" not in added[each]])
    random = np.random.default_rng(0)
    for length in random.integers(1, 12, PROBES):
        ids = random.choice(whole, length).tolist()
        if _joined(ids, words, spaced) != tokenizer.decode(ids):
            return None
    return words, spaced, all(spaced[each] and words[each] for each in plain)


def _joined(ids: list[int], words: list[str], spaced: list[bool]) -> str:
    """What the graph's text is."""
    text = ""
    for place, each in enumerate(ids):
        inside = any(words[i] for i in ids[:place]) and any(words[i] for i in ids[place:])
        text += (" " if spaced[each] and inside else "") + words[each]
    return text


def _text(main: Scope, ids: str, words: list[str], spaced: list[bool], simple: bool) -> str:
    """ids [length] → their text [1], without a space at its beginning and end."""
    constant = main.constant
    axis, empty = constant(0), constant([""], object)
    pieces = main("Gather", constant(words, object), ids)  # [length]
    if simple:
        inside = main("Greater", main("Range", axis, main("Squeeze", main("Shape", ids)), constant(1)), axis)
    else:
        filled = main("Gather", constant([bool(word) for word in words], np.int32), ids)
        began = main("Greater", main("CumSum", filled, axis, exclusive=1), constant(0, np.int32))
        goes_on = main("Greater", main("CumSum", filled, axis, reverse=1), constant(0, np.int32))
        inside = main("And", main("Gather", constant(spaced, bool), ids), main("And", began, goes_on))
    spaces = main("Where", inside, constant([" "], object), empty)
    pieces = main("StringConcat", spaces, pieces)
    body = Body(main, "join")
    text = body.carry("text", empty, TensorProto.STRING, [1])
    body.nexts = [(body.scope("StringConcat", text, body.scope("Gather", pieces, body.step)), TensorProto.STRING)]
    return body.close(main("Squeeze", main("Shape", ids)), "join/going")[0]
