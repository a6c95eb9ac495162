"""What the Python runtime makes of pixels, texts and photos, written down for the JavaScript tests."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from edgecap.benchmarks.datasets import open_dataset
from edgecap.devices.site import write_site
from edgecap.runtime import Bundle, Caption, Captioner, Preprocess, load_image, write_bundle
from edgecap.runtime.tokenizer import Tokenizer, plain_words
from edgecap.runtime.verify import verify_golden

from .graphs import tokenizer_json, write_gru_bundle
from .kv_graphs import drawn, write_kv_bundle

TEXTS = [
    "a red circle",
    "A Dog's ball, isn't it?",
    "zwölf naïve cafés at 2.5 m/s & #7",
    "the t-shirt cannot be seen",
    "写真 of 日本",
    "  two   spaces\tand a tab ",
    "",
    "don't I'm we've they'll he'd",
    "ǅ İstanbul ß 3½ ²",
]


def write_fixture(folder: Path) -> None:
    """Everything that runtime/web/test reads, in `folder`."""
    _write_pixels(folder)
    _write_pngs(folder)
    _write_tokenizers(folder)
    _write_bundles(folder)
    _write_beside(folder)
    write_site(Bundle.open(folder / "gru.edgecap"), folder / "site")


def _write_pixels(folder: Path) -> None:
    """Photos of many shapes before and after preprocessing; the order of the bytes is that of the cases."""
    rng = np.random.default_rng(7)
    cases, data = [], []
    for number in range(240):
        width, height = (int(side) for side in np.exp(rng.uniform(0, np.log(300), 2)))
        columns, rows = (int(side) for side in np.exp(rng.uniform(0, np.log(160), 2)))
        width, height = (columns if number % 7 == 0 else width), (rows if number % 11 == 0 else height)
        channels = 4 if number % 5 == 0 else 3
        photo = rng.integers(0, 256, (height, width, channels), np.uint8)
        if number % 3 == 0:
            photo = photo // 128 * np.uint8(255)  # hard edges: bicubic weights overshoot
        mode, resample = ("squash", "crop")[number % 2], ("bilinear", "bicubic")[number // 2 % 2]
        result = Preprocess((rows, columns), mode, resample)(load_image(photo))
        if number % 4 == 3:  # the filter of framed captioners, which Preprocess has not
            mode, resample = "squash", "lanczos"
            result = np.asarray(load_image(photo).resize((columns, rows), Image.Resampling.LANCZOS))
        cases.append({"width": width, "height": height, "channels": channels, "size": [rows, columns]})
        cases[-1] |= {"mode": mode, "resample": resample}
        data += [photo.tobytes(), result.tobytes()]
    (folder / "pixels.json").write_text(json.dumps(cases))
    (folder / "pixels.bin").write_bytes(b"".join(data))


def _write_pngs(folder: Path) -> None:
    """PNG files of every mode, and their pixels over white; null where JavaScript reads none."""
    colour, cases = drawn(3, 23, 9), []
    alpha = colour.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(colour.size))
    palette = colour.quantize(200)
    deep = Image.fromarray(np.arange(23 * 9, dtype=np.uint16).reshape(9, 23) * 300)
    images = [colour, alpha, colour.convert("L"), alpha.convert("LA"), palette, colour.convert("1"), deep]
    options: list[dict[str, Any]] = [{}] * len(images)
    images += [palette, colour.convert("L"), colour, Image.effect_noise((40, 30), 90)]
    options += [{"transparency": each} for each in (3, 77, colour.getpixel((5, 5)))] + [{"optimize": True}]
    for orientation in range(10):  # 0 and 9 are none
        exif = Image.Exif()
        exif[0x0112] = orientation
        images.append(alpha if orientation == 6 else colour)
        options.append({"exif": exif})
    for image, extra in zip(images, options, strict=True):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", **extra)
        png = buffer.getvalue()
        read = image.mode not in ("1", "I;16")
        rgb = base64.b64encode(load_image(png).tobytes()).decode() if read else None
        said = {name: dict(value) if name == "exif" else value for name, value in extra.items()}
        cases.append({"mode": f"{image.mode} {said}", "png": base64.b64encode(png).decode(), "rgb": rgb})
    (folder / "pngs.json").write_text(json.dumps(cases))


def _write_tokenizers(folder: Path) -> None:
    """tokenizer.json files of every kind that captioners have, with texts, ids, and texts of ids."""
    texts = [plain_words(text) for text in TEXTS]
    learnt = [*texts, *(f"a {a} {b} on the {c}" for a in ("red", "blue") for b in ("circle", "square") for c in "abc")]
    specials = ["<pad>", "<bos>", "<eos>", "<unk>"]

    def byte_level(prefix_space: bool, parts: list[Any]) -> Inner:
        inner = Inner(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        )
        inner.train_from_iterator(learnt, trainer)
        return inner

    word = Inner.from_str(tokenizer_json().decode())
    gpt2 = byte_level(True, [])
    gpt2.normalizer = normalizers.Lowercase()
    gpt2.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    llama = byte_level(False, [pre_tokenizers.Digits(individual_digits=True)])
    llama.normalizer = normalizers.Sequence([normalizers.Prepend(" ")])
    llama.decoder = decoders.ByteLevel()
    unigram = Inner(models.Unigram())
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    unigram.train_from_iterator(
        learnt,
        trainers.UnigramTrainer(vocab_size=90, special_tokens=specials, unk_token="<unk>", show_progress=False),
    )
    rng, cases = np.random.default_rng(1), []
    for inner in (word, gpt2, llama, unigram):
        tokenizer = Tokenizer.load(inner.to_str().encode())
        some = [rng.integers(0, tokenizer.vocab_size, 8).tolist() for _ in range(20)]
        ids = [*(tokenizer.encode(text) for text in texts), *some]
        cases.append(
            {
                "tokenizer": json.loads(inner.to_str()),
                "encoded": [[text, tokenizer.encode(text)] for text in texts],
                "decoded": [[each, tokenizer.decode(each)] for each in ids],
            }
        )
    words = [[text, plain_words(text)] for text in TEXTS]
    (folder / "tokenizers.json").write_text(json.dumps({"tokenizers": cases, "words": words}))


def _write_bundles(folder: Path) -> None:
    """Bundles of every wiring and the captions of scenes and of drawn photos."""
    scenes = [np.asarray(each.load()) for each in list(open_dataset("scenes:size=64").splits["test"])[:100]]
    shapes = [(37, 64), (64, 21), (16, 16), (90, 45), (45, 41), (23, 120)]
    odd = [np.asarray(drawn(i, *shapes[i % len(shapes)])) for i in range(12)]
    bicubic = {"size": [16, 16], "mode": "crop", "resample": "bicubic"}
    bundles = {
        "gru": (write_gru_bundle(folder / "gru.edgecap", seed=3).path, scenes),
        "crop": (write_gru_bundle(folder / "crop.edgecap", seed=5, preprocess=bicubic).path, odd),
        "concatenated": (write_kv_bundle(folder / "concatenated.edgecap", in_place=False, seed=4).path, odd),
        "in_place": (write_kv_bundle(folder / "in_place.edgecap", in_place=True, seed=4).path, odd),
        "framed": (write_kv_bundle(folder / "framed.edgecap", in_place=True, framed=True, seed=4).path, odd),
        "budget": (write_kv_bundle(folder / "budget.edgecap", in_place=True, framed=True, side="side").path, odd),
        "squashed": (
            write_kv_bundle(folder / "squashed.edgecap", in_place=True, framed=True, side="side", squashed=32).path,
            odd,
        ),
    }
    searches: list[dict[str, Any]] = [
        {"beam": 1},
        {"beam": 3},
        {"beam": 4, "length_penalty": 0.7, "no_repeat_ngram": 2, "min_length": 5, "max_length": 9},
        {"beam": 1, "no_repeat_ngram": 2, "min_length": 6},
        {"beam": 2, "prompt": "a red"},
        {"beam": 16, "max_length": 3},  # more beams than words
    ]
    usual = {name: searches for name in bundles} | {"gru": searches[:3]}
    sizes: list[dict[str, Any]] = [{}, {"image_size": 8}, {"image_size": 16, "beam": 2}, {"tiles": False}]
    usual |= {"budget": sizes, "squashed": [*sizes, {"image_size": 8, "tiles": True}]}
    found = {}
    for name, (path, photos) in bundles.items():
        with Captioner.load(path, threads=1) as captioner:
            (folder / f"{name}.bin").write_bytes(b"".join(photo.tobytes() for photo in photos))
            found[name] = {
                "sizes": [[photo.shape[1], photo.shape[0]] for photo in photos],
                "searches": [
                    {"options": search, "captions": [_caption(captioner(photo, **search)) for photo in photos]}
                    for search in usual[name]
                ],
                "golden": _caption(captioner(path / "golden.png")),
                "verify": verify_golden(captioner).to_dict(),
            }
    (folder / "captions.json").write_text(json.dumps(found))


def _write_beside(folder: Path) -> None:
    """A bundle whose decoder keeps its weights in a file of their own."""
    whole = Bundle.open(folder / "in_place.edgecap")
    files = {name: whole.read(name) for name in whole.manifest["files"]}
    model = onnx.load_from_string(files["decoder.onnx"])
    onnx.external_data_helper.convert_model_to_external_data(model, location="decoder.bin", size_threshold=1024)
    onnx.save(model, folder / "decoder.onnx")
    files |= {name: (folder / name).read_bytes() for name in ("decoder.onnx", "decoder.bin")}
    manifest = {**whole.manifest, "graphs": dict(whole.manifest["graphs"])}
    manifest["graphs"]["decoder"] = {**manifest["graphs"]["decoder"], "weights": "decoder.bin"}
    write_bundle(folder / "beside.edgecap", manifest, files)


def _caption(caption: Caption) -> dict[str, Any]:
    return {"alternatives": [], **caption.to_dict()}
