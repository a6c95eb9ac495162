"""The LSTM and the transformer against PyTorch's own, on captions of several lengths, and what of a photo is shared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgecap.runtime.errors import UsageError
from edgecap.train.models.attention import CrossAttention
from edgecap.train.models.gru import GRUDecoder
from edgecap.train.models.lstm import LSTMDecoder
from edgecap.train.models.transformer import TransformerDecoder

VOCAB, MEMORY, CELLS = 30, 12, 5
MAKE = {
    "gru": lambda: GRUDecoder(MEMORY, VOCAB, hidden=10, embed=8, heads=2, dropout=0.0),
    "lstm": lambda: LSTMDecoder(MEMORY, VOCAB, hidden=10, embed=8, heads=2, dropout=0.0),
    "transformer": lambda: TransformerDecoder(MEMORY, VOCAB, dim=16, layers=2, heads=4, ffn=24, dropout=0.0),
}


def make(kind: str, seed: int = 0) -> nn.Module:
    """Random weights, large enough that everything matters."""
    torch.manual_seed(seed)
    decoder = MAKE[kind]().eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(2.0) if parameter.ndim > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
        decoder.embedding.weight.normal_()
    return decoder


def captions(photos: int = 3, each: int = 4, length: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """memory [N, L, D], ids [N, C, T], keep [N, C, T]: captions of every length, one of them missing."""
    generator = torch.Generator().manual_seed(1)
    memory = torch.randn(photos, CELLS, MEMORY, generator=generator)
    ids = torch.randint(4, VOCAB, (photos, each, length), generator=generator)
    lengths = torch.randint(1, length + 1, (photos, each, 1), generator=generator)
    lengths[1, each // 2] = 0
    return memory, ids, torch.arange(length) < lengths


# --- against PyTorch's own -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_lstm_is_pytorchs_cell_with_attention_at_its_input() -> None:
    decoder, (memory, ids, _) = make("lstm"), captions(each=1)
    cell, size = nn.LSTMCell(8 + MEMORY, 10), decoder.hidden
    order = [0, 1, 3, 2]  # PyTorch's gates are input, forget, new, output; ours input, forget, output, new

    def turned(rows: Tensor) -> Tensor:
        return torch.cat([rows.split(size)[gate] for gate in order])

    cell.weight_ih.copy_(turned(torch.cat((decoder.from_word.weight, decoder.from_context.weight), 1)))
    cell.weight_hh.copy_(turned(decoder.from_hidden.weight))
    cell.bias_ih.copy_(turned(decoder.from_word.bias))
    cell.bias_hh.copy_(turned(decoder.from_hidden.bias))
    # The query is projected beforehand: it is of another size than the memory, which PyTorch's does not take.
    attention = nn.MultiheadAttention(MEMORY, decoder.heads, bias=False, batch_first=True)
    attention.in_proj_weight.copy_(torch.eye(MEMORY).repeat(3, 1))
    attention.out_proj.weight.copy_(torch.eye(MEMORY))

    h, c = torch.tanh(decoder.start(memory.mean(1))).chunk(2, dim=1)
    expected = []
    for t in range(ids.shape[2]):
        word = decoder.embedding(ids[:, 0, t])
        context = attention(decoder.query(h).unsqueeze(1), memory, memory)[0].squeeze(1)
        h, c = cell(torch.cat((word, context), 1), (h, c))
        out = decoder.out(torch.cat((h, context, word), 1))
        expected.append(out @ decoder.embedding.weight.T + decoder.out_bias)
    torch.testing.assert_close(decoder(memory, ids)[:, 0], torch.stack(expected, 1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_new_lstm_forgets_little() -> None:
    torch.manual_seed(0)
    decoder = MAKE["lstm"]()
    _, forget, output, _ = decoder.from_word.bias.split(decoder.hidden)
    assert float(forget.mean() - output.mean()) == pytest.approx(1.0, abs=0.3)


@torch.no_grad()
def test_the_transformer_is_pytorchs() -> None:
    decoder, (memory, ids, _) = make("transformer"), captions(each=1)
    layer = nn.TransformerDecoderLayer(16, 4, 24, 0.0, "gelu", batch_first=True, norm_first=True)
    theirs = nn.TransformerDecoder(layer, 2, norm=nn.LayerNorm(16)).eval()
    for ours, other in zip(decoder.blocks, theirs.layers, strict=True):
        other.self_attn.in_proj_weight.copy_(ours.attend.qkv.weight)
        other.self_attn.in_proj_bias.copy_(ours.attend.qkv.bias)
        other.multihead_attn = nn.MultiheadAttention(16, 4, kdim=MEMORY, vdim=MEMORY, batch_first=True)
        k, v = ours.look.kv.weight.chunk(2)
        other.multihead_attn.q_proj_weight.copy_(ours.look.q.weight)
        other.multihead_attn.k_proj_weight.copy_(k)
        other.multihead_attn.v_proj_weight.copy_(v)
        other.multihead_attn.in_proj_bias.copy_(torch.cat((ours.look.q.bias, ours.look.kv.bias)))
        for mine, yours in (
            (ours.attend.out, other.self_attn.out_proj),
            (ours.look.out, other.multihead_attn.out_proj),
            (ours.feed.up, other.linear1),
            (ours.feed.down, other.linear2),
            (ours.attend_norm, other.norm1),
            (ours.look_norm, other.norm2),
            (ours.feed_norm, other.norm3),
        ):
            yours.load_state_dict(mine.state_dict())
    theirs.norm.load_state_dict(decoder.norm.state_dict())
    length = ids.shape[2]
    words = decoder.embedding(ids[:, 0]) + decoder.positions.weight[:length]
    mask = nn.Transformer.generate_square_subsequent_mask(length)
    hidden = theirs(words, decoder.memory_norm(memory), tgt_mask=mask, tgt_is_causal=True)
    expected = hidden @ decoder.embedding.weight.T
    torch.testing.assert_close(decoder(memory, ids)[:, 0], expected, rtol=1e-4, atol=1e-4)


# --- captions of a photo -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKE)
@torch.no_grad()
def test_captions_of_a_photo_are_as_each_alone(kind: str) -> None:
    decoder, (memory, ids, keep) = make(kind), captions()
    kept, row = decoder(memory, ids, keep), 0
    assert len(kept) == int(keep.sum())
    for photo in range(ids.shape[0]):
        for caption in range(ids.shape[1]):
            length = int(keep[photo, caption].sum())
            if length:
                alone = decoder(memory[photo : photo + 1], ids[photo, caption, :length].view(1, 1, -1))[0, 0]
                torch.testing.assert_close(kept[row : row + length], alone, rtol=1e-4, atol=1e-4)
            row += length


@pytest.mark.parametrize("kind", MAKE)
def test_gradients_reach_every_parameter_and_no_word_behind_the_end(kind: str) -> None:
    decoder, (memory, ids, keep) = make(kind).train(), captions()
    memory.requires_grad_()
    logits = decoder(memory, ids, keep)
    torch.nn.functional.cross_entropy(logits, ids[keep]).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert (memory.grad.abs().sum((1, 2)) > 0).all()
    behind = ids.clone()
    behind[~keep] = 3
    with torch.no_grad():
        torch.testing.assert_close(decoder(memory, behind, keep), logits)


@torch.no_grad()
def test_a_photo_s_keys_and_values_are_computed_once_and_never_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, (memory, ids, keep) = make("transformer"), captions(photos=3, each=4)
    projected, looked = [], []
    compute, forward = CrossAttention.keys_values, CrossAttention.forward

    def keys_values(self: CrossAttention, memory: Tensor) -> tuple[Tensor, Tensor]:
        projected.append(len(memory))
        return compute(self, memory)

    def look(self: CrossAttention, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        looked.append((len(x), len(k)))
        return forward(self, x, k, v)

    monkeypatch.setattr(CrossAttention, "keys_values", keys_values)
    monkeypatch.setattr(CrossAttention, "forward", look)
    decoder(memory, ids, keep)
    assert projected == [3, 3] and looked == [(12, 3), (12, 3)]  # 12 captions of 3 photos, in two layers
    photo = decoder.photo(memory)
    _, state = decoder.begin(photo, ids[:, 0, :2])
    decoder.advance(ids[:, 0, 2], torch.arange(3), photo, state)
    assert projected == [3, 3, 3, 3]  # once more for the photo, not for prefill and step
    assert not any(name.startswith("cross") for name in state)


def test_more_positions_than_the_transformer_has_are_one_line() -> None:
    decoder = TransformerDecoder(MEMORY, VOCAB, dim=16, layers=1, heads=2, ffn=8, max_positions=6)
    with pytest.raises(UsageError, match="max_positions = 6 is too few for 7 caption positions"):
        decoder(torch.randn(1, CELLS, MEMORY), torch.ones(1, 1, 7, dtype=torch.long))


def test_sizes_that_cannot_be() -> None:
    for options, message in (({"heads": 3}, "heads must divide dim"), ({"layers": 0}, "layers must be 1 or more")):
        with pytest.raises(ValueError, match=message):
            TransformerDecoder(MEMORY, VOCAB, dim=16, **options)
