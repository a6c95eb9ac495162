"""The attention GRU: a recurrent decoder that looks over the encoder's grid at every word."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .recurrent import RecurrentDecoder
from .recurrent_graph import RecurrentStep, State, constant


class GRUStep(RecurrentStep):
    """The GRU's step in the decoder graph; the gates are reset, update and new."""

    splits = (2, 1)

    def set_biases(self, of_word: Tensor, of_hidden: Tensor) -> None:
        both = 2 * self.hidden  # reset and update: their biases add up
        self.gates_bias = constant(of_word[:both] + of_hidden[:both])
        self.new_bias, self.h_new_bias = constant(of_word[both:]), constant(of_hidden[both:])

    def cell(self, by_hidden: Sequence[Tensor], by_seen: Sequence[Tensor], state: Sequence[Tensor]) -> State:
        (h_gates, h_new), (x_gates, x_new) = by_hidden, by_seen
        gates = torch.sigmoid(h_gates + x_gates + self.gates_bias)
        reset, update = torch.split(gates, [self.hidden, self.hidden], dim=-1)
        new = torch.tanh(x_new + self.new_bias + reset * (h_new + self.h_new_bias))
        return (new + update * (state[0] - new),)


class GRUDecoder(RecurrentDecoder):
    """RecurrentDecoder with a GRU (Cho et al. 2014, arXiv:1406.1078, in PyTorch's form)."""

    gates, states, step_form = 3, ("h",), GRUStep

    def cell(self, word_gates: Tensor, context: Tensor, state: State) -> State:
        """One GRU step written as MatMul and gates, so that its weights quantize."""
        (hidden,) = state
        x_r, x_z, x_n = (word_gates + self.from_context(context)).chunk(3, dim=-1)
        h_r, h_z, h_n = self.from_hidden(hidden).chunk(3, dim=-1)
        reset, update = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        new = torch.tanh(x_n + reset * h_n)
        return (new + update * (hidden - new),)
