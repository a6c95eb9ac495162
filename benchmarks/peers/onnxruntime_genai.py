"""A SmolVLM in ONNX Runtime GenAI: fp32, int8 or int4.

It knows no SmolVLM ("Unsupported model_type in config.json: idefics3", and its builder has none either), but its
multimodal pipeline is the same plan: an encoder's features go into an embedding graph, and that into a decoder. So its
own builder makes the text part as the llama that it is, encoder and embedding graph are exported here, and the runtime
is told that they are a gemma3. All of it runs inside one call: there is no encode stage to time.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ...runtime.errors import UsageError
from .vlm import Marks, Task, VlmPeer, copy_words, main, positions, words_by

if TYPE_CHECKING:
    from PIL.Image import Image

VISION, EMBEDDING, DECODER = "vision.onnx", "embedding.onnx", "model.onnx"
BUILDER = "onnxruntime_genai.models.builder"
QUANTIZED = ["block_size=32", "accuracy_level=4"]  # activations are rounded to 8 bits, too


class OnnxRuntimeGenAIPeer(VlmPeer):
    kind = "onnxruntime_genai"
    needs = ("numpy", "tokenizers", "onnxruntime_genai")
    packages = ("onnxruntime-genai", "onnxruntime", "numpy", "tokenizers")

    @classmethod
    def make(cls, task: Task, folder: Path) -> None:
        """Needs torch, transformers, onnx and onnxruntime beside onnxruntime-genai."""
        with TemporaryDirectory(dir=folder) as scratch:
            place = Path(scratch)
            save_text(task, place / "text")
            build(place / "text", folder, task.precision)
            export(task, folder, place)
        copy_words(task, folder)
        settings(task, folder)

    def load(self, threads: int) -> None:
        import onnxruntime_genai as genai
        from tokenizers import Tokenizer

        config = genai.Config(str(self.folder))
        options = {"intra_op_num_threads": threads, **self.task.settings}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.genai, self.model = genai, genai.Model(config)
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.ids = self.tokenizer.encode(self.task.prompt(), add_special_tokens=False).ids
        self.end = json.loads((self.folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]

    def prepare(self, picture: Image) -> Any:
        import numpy as np

        pixels = np.asarray(picture.convert("RGB"), np.float32).transpose(2, 0, 1)[None]  # [1, 3, H, W]
        given = self.genai.NamedTensors()
        given["input_ids"] = np.array([self.ids], np.int32)
        given["pixel_values"] = np.ascontiguousarray(pixels / 127.5 - 1)
        given["num_image_tokens"] = np.array([self.task.tokens], np.int64)
        return given

    def run(self, inputs: Any, marks: Marks) -> list[int]:
        start = len(self.ids)
        params = self.genai.GeneratorParams(self.model)
        params.set_search_options(
            do_sample=False, min_length=start + self.shortest, max_length=start + self.longest, batch_size=1
        )
        generator = self.genai.Generator(self.model, params)
        generator.set_inputs(inputs)  # encodes the picture and fills the cache, in one call
        found: list[int] = []
        while not generator.is_done():
            logits = generator.get_logits()[0, -1] if marks.keep else None
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
            marks.token(logits)
        return [i for i in found if i != self.end]

    def words(self, ids: list[int]) -> str:
        return words_by(self.tokenizer, ids)


def save_text(task: Task, folder: Path) -> None:
    """The language model alone, as a llama's directory."""
    import torch
    from transformers import AutoModelForImageTextToText, LlamaForCausalLM

    whole = AutoModelForImageTextToText.from_pretrained(task.model, dtype=torch.float32)
    text = LlamaForCausalLM(whole.config.text_config)
    text.model.load_state_dict(whole.model.text_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    text.save_pretrained(folder)
    copy_words(task, folder)
    # Written as transformers 4 does, which the builder reads.
    theirs = json.loads((Path(task.model) / "config.json").read_text(encoding="utf-8"))["text_config"]
    config = {**theirs, "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def build(text: Path, folder: Path, precision: str) -> None:
    """Its own builder, in a process of its own: without embeddings, which the pipeline has apart."""
    command = [sys.executable, "-m", BUILDER, "-i", str(text), "-o", str(folder), "-p", precision, "-e", "cpu"]
    command += ["-c", str(folder / "cache"), "--extra_options", "exclude_embeds=true"]
    more = [] if precision == "fp32" else QUANTIZED
    if subprocess.run([*command, *more], stdout=sys.stderr).returncode:
        raise UsageError(f"{BUILDER} failed; its reason is above")
    shutil.rmtree(folder / "cache", ignore_errors=True)


def export(task: Task, folder: Path, scratch: Path) -> None:
    """Encoder with its projector, and words with the picture's features in their place."""
    import torch
    from transformers import AutoModelForImageTextToText

    whole = AutoModelForImageTextToText.from_pretrained(task.model, dtype=torch.float32).eval()
    image, rows = whole.config.image_token_id, whole.model.text_model.embed_tokens
    places = torch.from_numpy(positions(whole.config.vision_config.to_dict(), task.size))

    class Vision(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = whole.model

        def forward(self, pixel_values: Any) -> Any:  # [N, 3, H, W] → [N, tokens, dim]
            vision = self.model.vision_model
            patches = vision.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
            hidden = patches + vision.embeddings.position_embedding(places)
            hidden = vision.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
            return self.model.connector(vision.post_layernorm(hidden))

    class Embedding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = rows

        def forward(self, input_ids: Any, image_features: Any) -> Any:  # [1, T], [N, tokens, dim] → [1, T, dim]
            found = self.rows(input_ids)
            flat = image_features.reshape(-1, found.shape[-1])
            return found.masked_scatter((input_ids == image).unsqueeze(-1), flat)

    pixels = torch.zeros(1, 3, task.size, task.size)
    ids = torch.tensor([[1, image, image, 5]])
    features = torch.zeros(1, 2, rows.embedding_dim)
    plain = folder if task.precision == "fp32" else scratch
    options: Any = {"opset_version": 17, "dynamo": False}
    torch.onnx.export(
        Vision().eval(),
        (pixels,),
        plain / VISION,
        input_names=["pixel_values"],
        output_names=["image_features"],
        **options,
    )
    torch.onnx.export(
        Embedding().eval(),
        (ids, features),
        plain / EMBEDDING,
        input_names=["input_ids", "image_features"],
        output_names=["inputs_embeds"],
        dynamic_axes={"input_ids": {1: "length"}, "image_features": {1: "tokens"}, "inputs_embeds": {1: "length"}},
        **options,
    )
    if task.precision != "fp32":
        round_weights(plain, folder)


def round_weights(plain: Path, folder: Path) -> None:
    """Encoder and words in 8 bits, by ONNX Runtime's own quantizer."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for file, kind in ((VISION, "MatMul"), (EMBEDDING, "Gather")):
        quantize_dynamic(
            plain / file,
            folder / file,
            per_channel=kind == "MatMul",
            weight_type=QuantType.QInt8,
            op_types_to_quantize=[kind],
            extra_options={"MatMulConstBOnly": True},
        )


def settings(task: Task, folder: Path) -> None:
    """genai_config.json of the builder's llama, as that of a picture's pipeline."""
    file = folder / "genai_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    theirs = json.loads((Path(task.model) / "config.json").read_text(encoding="utf-8"))
    config["model"] |= {
        "type": "gemma3",
        "image_token_id": theirs["image_token_id"],
        "vision": {
            "filename": VISION,
            "inputs": {"pixel_values": "pixel_values"},
            "outputs": {"image_features": "image_features"},
        },
        "embedding": {
            "filename": EMBEDDING,
            "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
            "outputs": {"inputs_embeds": "inputs_embeds"},
        },
    }
    inputs = config["model"]["decoder"]["inputs"]
    inputs.pop("input_ids", None)
    inputs["inputs_embeds"] = "inputs_embeds"
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main(OnnxRuntimeGenAIPeer)
