"""A SmolVLM in OpenVINO GenAI's VLMPipeline, made from what optimum-intel exported: fp32, int8 or int4.

The pipeline knows no SmolVLM ("Unsupported 'idefics3' VLM model type"), but its LLaVA is the same plan: the encoder's
embeddings replace <image> tokens of the prompt. So the graphs go in under that name, with what LLaVA lacks put inside:
the encoder's positions and mask become constants, and the tokenizer drops the newline that LLaVA puts after a picture.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.errors import UsageError
from .vlm import IMAGE, Marks, Task, VlmPeer, copy_words, main, positions

if TYPE_CHECKING:
    from PIL.Image import Image

VISION = "openvino_vision_embeddings_model.xml"
GRAPHS = ("openvino_language_model", "openvino_text_embeddings_model")


class OpenVinoGenAIPeer(VlmPeer):
    kind = "openvino_genai"
    needs = ("numpy", "openvino", "openvino_genai")
    packages = ("openvino-genai", "openvino", "openvino-tokenizers")

    @classmethod
    def make(cls, task: Task, folder: Path) -> Task:
        """From an optimum_intel peer's folder, with an interpreter that has openvino-tokenizers and transformers."""
        source = Path(task.model)
        theirs = Task.read(source)
        if theirs.kind != "optimum_intel" or theirs.size != task.size:
            raise UsageError(f"{source} must be the folder of --peer optimum_intel for {task.size} px")
        for graph in GRAPHS:
            for suffix in (".xml", ".bin"):
                shutil.copyfile(source / f"{graph}{suffix}", folder / f"{graph}{suffix}")
        fixed_vision(source, folder, task.size)
        write_tokenizer(theirs, folder)
        copy_words(theirs, folder)
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        dress = {
            "model_type": "llava",
            "hidden_size": config["text_config"]["hidden_size"],
            "vision_config": {"patch_size": config["vision_config"]["patch_size"]},
            "image_token_id": config["image_token_id"],
        }
        images = {
            "size": {"shortest_edge": task.size},
            "crop_size": {"height": task.size, "width": task.size},
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
        for name, values in (("config.json", dress), ("preprocessor_config.json", images)):
            (folder / name).write_text(json.dumps(values, indent=2), encoding="utf-8")
        return replace(theirs, kind=cls.kind, settings=task.settings)

    def load(self, threads: int) -> None:
        import openvino_genai as genai

        exact = {"KV_CACHE_PRECISION": "f32"} if self.task.precision == "fp32" else {}
        properties = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, **exact}
        self.pipeline = genai.VLMPipeline(str(self.folder), "CPU", **properties, **self.task.settings)
        self.options = self.pipeline.get_generation_config()
        self.options.max_new_tokens, self.options.min_new_tokens = self.longest, self.shortest
        self.options.do_sample, self.options.apply_chat_template = False, False
        self.tokenizer = self.pipeline.get_tokenizer()
        self.end = json.loads((self.folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
        self.streamer = streamer(genai)

    def prepare(self, picture: Image) -> Any:
        import numpy as np
        import openvino as ov

        return ov.Tensor(np.ascontiguousarray(np.asarray(picture.convert("RGB"))[None]))  # [1, H, W, 3]

    def run(self, inputs: Any, marks: Marks) -> list[int]:
        from time import perf_counter

        told, begin = self.streamer(marks), perf_counter()
        found = self.pipeline.generate(
            self.task.prompt(image=IMAGE), images=[inputs], generation_config=self.options, streamer=told
        )
        # Its own image processing and both embeddings; told in milliseconds afterwards.
        marks.encoded = begin + found.perf_metrics.get_prepare_embeddings_duration().mean / 1000
        return [i for i in told.ids if i != self.end]

    def words(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids)).strip()


def streamer(genai: Any) -> Any:
    """A class of streamers that note tokens and their times."""

    class Clock(genai.StreamerBase):
        def __init__(self, marks: Marks) -> None:
            super().__init__()
            self.marks = marks
            self.ids: list[int] = []

        def write(self, token: Any) -> Any:
            for each in token if isinstance(token, list) else [token]:
                self.ids.append(int(each))
                self.marks.token()
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    return Clock


def fixed_vision(source: Path, folder: Path, size: int) -> None:
    """The encoder for pictures of one size: all patches are there, in reading order, and only pixels are an input."""
    import numpy as np
    import openvino as ov
    from openvino import opset13 as ops

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))["vision_config"]
    side = size // config["patch_size"]
    constants = {
        "patch_attention_mask": np.ones((1, side, side), bool),
        "patch_position_ids": positions(config, size),
    }
    model = ov.Core().read_model(source / VISION)
    for parameter in list(model.get_parameters()):
        name = parameter.output(0).get_any_name()
        if name in constants:
            parameter.output(0).replace(ops.constant(constants[name]).output(0))
            model.remove_parameter(parameter)
    model.reshape({"pixel_values": [1, 3, size, size]})
    ov.save_model(model, folder / VISION, compress_to_fp16=False)


def write_tokenizer(task: Task, folder: Path) -> None:
    """The tokenizer as OpenVINO graphs; <image> takes whitespace behind it along."""
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(task.model)
    tokenizer.add_tokens([AddedToken(IMAGE, rstrip=True, normalized=False, special=True)], special_tokens=True)
    graphs = convert_tokenizer(tokenizer, with_detokenizer=True, skip_special_tokens=True)
    for name, graph in zip(("openvino_tokenizer", "openvino_detokenizer"), graphs, strict=True):
        ov.save_model(graph, folder / f"{name}.xml")


if __name__ == "__main__":
    main(OpenVinoGenAIPeer)
