"""The attention GRU's step as the decoder graph computes it: the same sums in fewer and larger multiplications.

At one row an engine spends as long on each small operation as on a small matrix, so what shares an input is one matrix
here: hidden → gates and query; context and word → gates and output features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class GRUStep(nn.Module):
    """One word for every row, from a GRUDecoder's weights (copied, so a later change of the decoder is not seen).

    Biases meet tensors that were split or have another rank, never a product itself: ONNX Runtime would turn product
    and bias into a Gemm, which it cannot run in int8. And the state that leaves the graph has another rank than the one
    that is multiplied: it is not to be rounded to int8 with it.
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.hidden, self.memory_dim, self.heads = decoder.hidden, decoder.memory_dim, decoder.heads
        self.embed = decoder.embedding.embedding_dim
        from_hidden, from_word, out = decoder.from_hidden, decoder.from_word, decoder.out
        # Softmax's scale goes into the query: engines have their fast product for plain ones only.
        query = decoder.query.weight * (self.memory_dim // self.heads) ** -0.5
        out_h, out_context, out_word = out.weight.split([self.hidden, self.memory_dim, self.embed], dim=1)
        by_context = torch.cat((decoder.from_context.weight, out_context))  # [3H + E, D]
        by_word = torch.cat((from_word.weight, out_word))  # [3H + E, E]
        k = _balance(decoder.embedding.weight, by_word, by_context)
        # Matrices are [inputs, outputs], as MatMul takes them.
        self.by_hidden = _constant(torch.cat((from_hidden.weight, query)).t())  # [H, 3H + D]
        seen = torch.cat((by_context, by_word / k), dim=1)
        seen[3 * self.hidden :] /= k  # the output layer, which shares the word embedding, multiplies by k again
        self.by_seen = _constant(seen.t())  # [D + E, 3H + E]
        self.by_new = _constant(out_h.t() / k)  # [H, E]
        both = 2 * self.hidden  # reset and update: their biases add up
        self.gates_bias = _constant(from_word.bias[:both] + from_hidden.bias[:both])
        self.new_bias, self.h_new_bias = _constant(from_word.bias[both:]), _constant(from_hidden.bias[both:])
        self.features_bias = _constant(out.bias / k)
        self.embedding = _constant(decoder.embedding.weight * k)  # [V, E]
        self.word_bias = _constant(decoder.out_bias)

    def forward(self, ids: Tensor, photo: Tensor, grid: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """ids [B], photo index [B], grid [N, heads, L, size], h [B, H] → logits [B, V], next h."""
        hidden, size = self.hidden, self.memory_dim // self.heads
        word = nn.functional.embedding(ids, self.embedding)  # [B, E]
        # index_select: exports as one Gather and keeps the grid stored once per photo outside the graph.
        keys = grid.index_select(0, photo)  # [B, heads, L, size]
        h_gates, h_new, query = torch.split(h @ self.by_hidden, [2 * hidden, hidden, self.memory_dim], dim=-1)
        scores = query.reshape(-1, self.heads, 1, size) @ keys.transpose(2, 3)  # [B, heads, 1, L]
        context = (torch.softmax(scores, dim=-1) @ keys).reshape(-1, self.memory_dim)  # [B, D]
        seen = torch.cat((context, word), dim=-1) @ self.by_seen
        x_gates, x_new, features = torch.split(seen, [2 * hidden, hidden, self.embed], dim=-1)
        gates = torch.sigmoid(h_gates + x_gates + self.gates_bias)
        reset, update = torch.split(gates, [hidden, hidden], dim=-1)
        new = torch.tanh(x_new + self.new_bias + reset * (h_new + self.h_new_bias))
        h = new + update * (h - new)
        features = features + self.features_bias + h.unsqueeze(0) @ self.by_new  # [1, B, E]
        logits = features @ self.embedding.t() + self.word_bias
        return logits.squeeze(0), h


def _balance(word: Tensor, by_word: Tensor, by_context: Tensor) -> float:
    """By how much to multiply words, and divide their weights, so that one int8 matrix serves context and words alike.

    The square root of how much smaller words are than context (taken as of order 1) times how much larger their weights
    are (Xiao et al. 2022, arXiv:2211.10438, with alpha = 0.5), as a power of two, which rounds nothing.
    """
    sizes = [float(each.detach().square().mean().sqrt()) for each in (by_word, by_context, word)]
    return 2.0 ** round(math.log2(sizes[0] / sizes[1] / sizes[2]) / 2) if min(sizes) > 0 else 1.0


def _constant(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().clone().contiguous(), requires_grad=False)
