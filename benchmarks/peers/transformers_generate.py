"""A SmolVLM in transformers' own `generate`, as its model card runs it: fp32 or bf16, torch eager."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .vlm import Marks, Task, VlmPeer, main

if TYPE_CHECKING:
    from PIL.Image import Image


class Clock:
    """A logits processor that notes when each token's logits are there, and changes nothing."""

    def __init__(self, marks: Marks) -> None:
        self.marks = marks

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.marks.token(scores)
        return scores


class TransformersPeer(VlmPeer):
    kind = "transformers"
    needs = ("torch", "transformers")
    packages = ("torch", "transformers", "tokenizers", "numpy")

    @classmethod
    def make(cls, task: Task, folder: Path) -> None:
        """Nothing: the model's own directory is read."""

    def load(self, threads: int) -> None:
        import torch
        from transformers import AutoModelForImageTextToText

        torch.set_num_threads(threads)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.task.precision]
        self.dtype, self.marks = dtype, Marks()
        self.processor = processor(self.task)
        self.model = AutoModelForImageTextToText.from_pretrained(self.task.model, dtype=dtype).eval()
        self.model.model.connector.register_forward_hook(lambda *_: self.marks.encode())

    def files(self) -> list[Path]:
        return [file for file in Path(self.task.model).iterdir() if file.is_file()]

    def prepare(self, picture: Image) -> Any:
        return inputs(self.processor, self.task, picture).to(self.dtype)

    def run(self, inputs: Any, marks: Marks) -> list[int]:
        self.marks = marks
        return generate(self.model, inputs, marks, self.shortest, self.longest)

    def words(self, ids: list[int]) -> str:
        return str(self.processor.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def processor(task: Task) -> Any:
    """Idefics3Processor without torchvision: SmolVLM's own cannot be made without video packages and does the same."""
    from transformers import AutoTokenizer, Idefics3Processor

    try:
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil as Images
    except ImportError:  # transformers 4
        from transformers import Idefics3ImageProcessor as Images  # type: ignore[assignment]
    side = {"longest_edge": task.size}
    images = Images(size=side, max_image_size=side, do_image_splitting=False)
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    return Idefics3Processor(images, tokenizer, image_seq_len=task.tokens, chat_template=tokenizer.chat_template)


def inputs(processor: Any, task: Task, picture: Image) -> Any:
    """What the model takes, by the chat template."""
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": task.chat}]}]
    text = processor.apply_chat_template(said, add_generation_prompt=True)
    return processor(text=[text], images=[[picture]], return_tensors="pt", add_special_tokens=False)


def generate(model: Any, inputs: Any, marks: Marks, shortest: int, longest: int) -> list[int]:
    import torch
    from transformers import LogitsProcessorList

    with torch.inference_mode():
        found = model.generate(
            **inputs,
            do_sample=False,
            min_new_tokens=shortest,
            max_new_tokens=longest,
            logits_processor=LogitsProcessorList([Clock(marks)]),
        )
    ids = found[0, inputs["input_ids"].shape[1] :].tolist()
    end = model.generation_config.eos_token_id
    return [i for i in ids if i not in (end if isinstance(end, list) else [end])]


if __name__ == "__main__":
    main(TransformersPeer)
