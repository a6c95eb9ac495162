"""Models of a published shape with random weights: what they weigh layers with, whatever their width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgecap.benchmarks.peers import published


@pytest.mark.parametrize(("vision", "text", "gains"), [(768, 576, (0.04, 0.04)), (192, 1152, (0.08, 0.0283))])
def test_layers_are_as_loud_at_any_width(
    vision: int, text: int, gains: tuple[float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    from safetensors.torch import load_file

    class Words:
        def save(self, path: str) -> None:
            Path(path).write_text("{}")

    monkeypatch.setattr(published, "tokenizer", lambda rows: Words())
    config: dict[str, Any] = published.config("256m", layers=1)
    small = {"vocab_size": 300, "eos_token_id": 299, "bos_token_id": 1, "pad_token_id": 2}
    config |= {"vocab_size": 300, "image_token_id": 298}
    config["text_config"] |= small | {"hidden_size": text, "intermediate_size": 64, "num_attention_heads": 9}
    config["vision_config"] |= {"hidden_size": vision, "intermediate_size": 64, "image_size": 64}
    weights = load_file(published.save(tmp_path, config) / "model.safetensors")
    found = [
        float(
            next(value for name, value in weights.items() if part in name and name.endswith("q_proj.weight"))
            .float()
            .std()
        )
        for part in ("vision_model", "text_model")
    ]
    assert found == pytest.approx(gains, rel=0.02)


def test_the_large_one_is_as_published() -> None:
    config = published.config("2.2b")
    assert config["text_config"]["max_position_embeddings"] == 16384 and config["image_token_id"] == 49153
    assert published.processing(384, 81)["processor_config.json"]["image_seq_len"] == 81
