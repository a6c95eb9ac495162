"""The attention LSTM of Show, Attend and Tell (Xu et al. 2015, arXiv:1502.03044): two state vectors, h and c."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .recurrent import RecurrentDecoder
from .recurrent_graph import RecurrentStep, State, constant


class LSTMStep(RecurrentStep):
    """The LSTM's step in the decoder graph; the gates are input, forget, output and new."""

    splits = (4,)

    def set_biases(self, of_word: Tensor, of_hidden: Tensor) -> None:
        self.gates_bias = constant(of_word + of_hidden)

    def cell(self, by_hidden: Sequence[Tensor], by_seen: Sequence[Tensor], state: Sequence[Tensor]) -> State:
        return _cell(by_hidden[0] + by_seen[0] + self.gates_bias, state[1])


class LSTMDecoder(RecurrentDecoder):
    """RecurrentDecoder with an LSTM (Hochreiter & Schmidhuber 1997), its first h and c read from the photo's mean."""

    gates, states, step_form = 4, ("h", "c"), LSTMStep

    def initialise(self) -> None:
        super().initialise()
        # Forget nothing at first, so that gradients reach far back (Jozefowicz et al. 2015).
        with torch.no_grad():
            self.from_word.bias[self.hidden : 2 * self.hidden] += 1.0

    def cell(self, word_gates: Tensor, context: Tensor, state: State) -> State:
        """One LSTM step written as MatMul and gates, so that its weights quantize."""
        return _cell(word_gates + self.from_context(context) + self.from_hidden(state[0]), state[1])


def _cell(gates: Tensor, memory: Tensor) -> State:
    """gates [..., 4 · H] in the order input, forget, output, new (PyTorch's has the last two the other way round, but
    so one sigmoid does), memory c [..., H] → next h, next c."""
    size = memory.shape[-1]
    open_, new = torch.split(gates, [3 * size, size], dim=-1)
    take, hold, show = torch.split(torch.sigmoid(open_), [size, size, size], dim=-1)
    memory = hold * memory + take * torch.tanh(new)
    return show * torch.tanh(memory), memory
