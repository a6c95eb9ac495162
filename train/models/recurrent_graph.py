"""A recurrent decoder's step as the decoder graph computes it: the same sums in fewer and larger multiplications.

At one row an engine spends as long on each small operation as on a small matrix, so what shares an input is one matrix
here: hidden → gates and query; context and word → gates and output features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

State: TypeAlias = tuple[Tensor, ...]  # the vectors of a step, [rows, hidden] each


class RecurrentStep(nn.Module):
    """One word for every row, from a RecurrentDecoder's weights (copied: a later change of the decoder is not seen).

    A kind's `cell` adds the biases. They meet tensors that were split or have another rank, never a product itself:
    ONNX Runtime would turn product and bias into a Gemm, which it cannot run in int8. And the state that leaves the
    graph has another rank than the one that is multiplied: it is not to be rounded to int8 with it.
    """

    splits: tuple[int, ...]  # how many gates in a row a kind's `cell` takes as one tensor

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.hidden, self.memory_dim, self.heads = decoder.hidden, decoder.memory_dim, decoder.heads
        self.embed = decoder.embedding.embedding_dim
        from_hidden, from_word, out = decoder.from_hidden, decoder.from_word, decoder.out
        # Softmax's scale goes into the query: engines have their fast product for plain ones only.
        query = decoder.query.weight * (self.memory_dim // self.heads) ** -0.5
        out_h, out_context, out_word = out.weight.split([self.hidden, self.memory_dim, self.embed], dim=1)
        by_context = torch.cat((decoder.from_context.weight, out_context))  # [gates · H + E, D]
        by_word = torch.cat((from_word.weight, out_word))  # [gates · H + E, E]
        k = _balance(decoder.embedding.weight, by_word, by_context)
        # Matrices are [inputs, outputs], as MatMul takes them.
        self.by_hidden = constant(torch.cat((from_hidden.weight, query)).t())  # [H, gates · H + D]
        seen = torch.cat((by_context, by_word / k), dim=1)
        seen[-self.embed :] /= k  # the output layer, which shares the word embedding, multiplies by k again
        self.by_seen = constant(seen.t())  # [D + E, gates · H + E]
        self.by_new = constant(out_h.t() / k)  # [H, E]
        self.set_biases(from_word.bias, from_hidden.bias)
        self.features_bias = constant(out.bias / k)
        self.embedding = constant(decoder.embedding.weight * k)  # [V, E]
        self.word_bias = constant(decoder.out_bias)

    def set_biases(self, of_word: Tensor, of_hidden: Tensor) -> None:
        """Keep the gates' biases [gates · H] in the form that `cell` adds them."""
        raise NotImplementedError

    def cell(self, by_hidden: Sequence[Tensor], by_seen: Sequence[Tensor], state: Sequence[Tensor]) -> State:
        """The gates' two shares without biases, as `splits` says, and the state [B, H] → the next state."""
        raise NotImplementedError

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """ids [B], photo index [B], grid [N, heads, L, size], state [B, H] → logits [B, V], next state."""
        ids, photo, grid, *state = inputs
        parts = [count * self.hidden for count in self.splits]
        size = self.memory_dim // self.heads
        word = nn.functional.embedding(ids, self.embedding)  # [B, E]
        # index_select: exports as one Gather and keeps the grid stored once per photo outside the graph.
        keys = grid.index_select(0, photo)  # [B, heads, L, size]
        *h_gates, query = torch.split(state[0] @ self.by_hidden, [*parts, self.memory_dim], dim=-1)
        scores = query.reshape(-1, self.heads, 1, size) @ keys.transpose(2, 3)  # [B, heads, 1, L]
        context = (torch.softmax(scores, dim=-1) @ keys).reshape(-1, self.memory_dim)  # [B, D]
        seen = torch.cat((context, word), dim=-1) @ self.by_seen
        *x_gates, features = torch.split(seen, [*parts, self.embed], dim=-1)
        after = self.cell(h_gates, x_gates, state)
        features = features + self.features_bias + after[0].unsqueeze(0) @ self.by_new  # [1, B, E]
        logits = features @ self.embedding.t() + self.word_bias
        return logits.squeeze(0), *after


def _balance(word: Tensor, by_word: Tensor, by_context: Tensor) -> float:
    """By how much to multiply words, and divide their weights, so that one int8 matrix serves context and words alike.

    The square root of how much smaller words are than context (taken as of order 1) times how much larger their weights
    are (Xiao et al. 2022, arXiv:2211.10438, with alpha = 0.5), as a power of two, which rounds nothing.
    """
    sizes = [float(each.detach().square().mean().sqrt()) for each in (by_word, by_context, word)]
    return 2.0 ** round(math.log2(sizes[0] / sizes[1] / sizes[2]) / 2) if min(sizes) > 0 else 1.0


def constant(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().clone().contiguous(), requires_grad=False)
