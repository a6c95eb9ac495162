"""The attention GRU: a recurrent decoder that looks over the encoder's grid at every word.

Attention as in Xu et al. 2015 (arXiv:1502.03044) with scaled dot-product scores and several heads; the output layer
shares the word embedding (Press & Wolf 2017, arXiv:1608.05859).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gru_graph import GRUStep
from .widths import Columns, Width, units


class GRUDecoder(nn.Module):
    """Photo memory [N, L, D] and word ids in, logits out. The state is one vector [rows, hidden].

    hidden: GRU size; embed: word-embedding size (tied with the output layer); heads: attention heads (divides the
    memory's dimension); dropout: on embeddings and before the output layer, in [0, 1).
    """

    memory_kind = "grid"

    def __init__(
        self,
        memory_dim: int,
        vocab_size: int,
        *,
        hidden: int = 512,
        embed: int = 256,
        heads: int = 4,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        if memory_dim % heads:
            raise ValueError(f"heads ({heads}) must divide the bridge's dimension ({memory_dim})")
        self.hidden, self.heads, self.memory_dim = hidden, heads, memory_dim
        self.embedding = nn.Embedding(vocab_size, embed)
        self.start = nn.Linear(memory_dim, hidden)
        self.query = nn.Linear(hidden, memory_dim, bias=False)
        self.from_word = nn.Linear(embed, 3 * hidden)
        self.from_context = nn.Linear(memory_dim, 3 * hidden, bias=False)
        self.from_hidden = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden + memory_dim + embed, embed)
        self.out_bias = nn.Parameter(torch.zeros(vocab_size))
        self.dropout = nn.Dropout(dropout)
        # PyTorch's default σ = 1 makes tied logits explode at the start.
        nn.init.normal_(self.embedding.weight, std=0.05)
        nn.init.orthogonal_(self.from_hidden.weight)

    def photo(self, memory: Tensor) -> dict[str, Tensor]:
        """Everything that is computed once per photo: memory [N, L, D] → the grid as the heads see it
        [N, heads, L, D / heads] and the first state h0 [N, hidden]."""
        grid = memory.unflatten(2, (self.heads, self.memory_dim // self.heads)).transpose(1, 2)
        return {"grid": grid, "h0": torch.tanh(self.start(memory.mean(dim=1)))}

    def attend(self, hidden: Tensor, grid: Tensor) -> Tensor:
        """Context [N, R, D] for R rows per photo: hidden [N, R, H], grid [N, heads, L, size]."""
        n, rows, _ = hidden.shape
        size = self.memory_dim // self.heads
        query = self.query(hidden).view(n, rows, self.heads, size).transpose(1, 2)  # [N, heads, R, size]
        weights = torch.softmax(query @ grid.transpose(2, 3) * size**-0.5, dim=-1)  # [N, heads, R, L]
        return (weights @ grid).transpose(1, 2).reshape(n, rows, self.memory_dim)

    def cell(self, word_gates: Tensor, context: Tensor, hidden: Tensor) -> Tensor:
        """One GRU step (Cho et al. 2014, PyTorch's form) written as MatMul and gates, so that its weights quantize."""
        x_r, x_z, x_n = (word_gates + self.from_context(context)).chunk(3, dim=-1)
        h_r, h_z, h_n = self.from_hidden(hidden).chunk(3, dim=-1)
        reset, update = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        new = torch.tanh(x_n + reset * h_n)
        return new + update * (hidden - new)

    def logits(self, features: Tensor) -> Tensor:
        """features [..., H + D + E] (hidden, context, word) → [..., V]."""
        out = self.out(self.dropout(features))
        return F.linear(self.dropout(out), self.embedding.weight, self.out_bias)

    def step(self, ids: Tensor, grid: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """One word for R rows per photo: ids [N, R], hidden [N, R, H] → logits [N, R, V], next hidden."""
        word = self.dropout(self.embedding(ids))
        context = self.attend(hidden, grid)
        hidden = self.cell(self.from_word(word), context, hidden)
        return self.logits(torch.cat((hidden, context, word), dim=-1)), hidden

    def forward(self, memory: Tensor, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        """Teacher forcing: memory [N, L, D], input ids [N, C, T] (BOS first) → logits [N, C, T, V].

        With `keep` [N, C, T], true up to each caption's end, only those positions are computed: logits [K, V], in the
        order of `keep.nonzero()`.
        """
        if keep is None:
            keep = torch.ones_like(ids, dtype=torch.bool)
            return self(memory, ids, keep).unflatten(0, ids.shape)
        # Long captions first, photo by photo and inside each photo: the rows still active at any step are then a
        # corner [photos, captions], and no time goes into padding.
        lengths, by_length = keep.sum(2).sort(dim=1, descending=True, stable=True)  # [N, C]
        order = lengths[:, 0].argsort(descending=True, stable=True)  # [N]
        lengths, by_length = lengths[order], by_length[order]
        ids = ids[order.unsqueeze(1), by_length]
        photo = self.photo(memory[order])
        hidden = photo["h0"].unsqueeze(1).expand(-1, ids.shape[1], -1)  # [N, C, H]
        words = self.dropout(self.embedding(ids))  # [N, C, T, E]
        outputs, places = [], []
        for t in range(int(lengths.max())):
            n, c = int((lengths[:, 0] > t).sum()), int((lengths > t).any(0).sum())
            word, hidden = words[:n, :c, t], hidden[:n, :c]
            context = self.attend(hidden, photo["grid"][:n])
            hidden = self.cell(self.from_word(word), context, hidden)
            active = lengths[:n, :c] > t
            outputs.append(torch.cat((hidden, context, word), dim=-1)[active])  # [k, H + D + E]
            places.append(torch.cat((active.nonzero(), active.nonzero().new_full((len(outputs[-1]), 1), t)), 1))
        place = torch.cat(places)  # [K, 3] in the sorted order
        row = order[place[:, 0]]
        flat = (row * ids.shape[1] + by_length[place[:, 0], place[:, 1]]) * ids.shape[2] + place[:, 2]
        return self.logits(torch.cat(outputs)[flat.argsort()])

    # --- the two operations of a session, in torch -------------------------------------------------------------

    def begin(self, photo: dict[str, Tensor], ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Feed BOS and the prompt: ids [N, P] → logits [N, V] after the last id, state."""
        state = {"h": photo["h0"]}
        index = torch.arange(len(ids), device=ids.device)
        for position in range(ids.shape[1]):
            logits, state = self.advance(ids[:, position], index, photo, state)
        return logits, state

    def advance(
        self, ids: Tensor, index: Tensor, photo: dict[str, Tensor], state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """ids [B], photo index [B], state h [B, H] → logits [B, V], next state."""
        logits, hidden = self.step(ids.unsqueeze(1), photo["grid"][index], state["h"].unsqueeze(1))
        return logits.squeeze(1), {"h": hidden.squeeze(1)}

    # --- what pruning needs to know ----------------------------------------------------------------------------

    vocab_rows = ("embedding.weight", "out_bias")

    def widths(self) -> list[Width]:
        """The hidden units: each is one row of each of the three gates, and one column of all that reads the state."""
        unit = units(self.hidden)
        gates = torch.cat([unit + gate * self.hidden for gate in range(3)], dim=1)  # [H, 3]
        rows = {name: (0, gates) for name in ("from_word.weight", "from_word.bias", "from_context.weight")}
        rows |= {name: (0, gates) for name in ("from_hidden.weight", "from_hidden.bias")}
        rows |= {name: (0, unit) for name in ("start.weight", "start.bias")}
        readers = tuple(Columns(name, unit) for name in ("out", "query", "from_hidden"))
        return [Width("hidden", "hidden units", rows, readers)]

    def follows(self, options: dict[str, int]) -> dict[str, int]:
        """The recipe's other settings that change with pruned ones."""
        return {}

    # --- what the export needs to know -------------------------------------------------------------------------

    photo_outputs = ("grid", "h0")

    def session_roles(self) -> dict:
        """How the runtime wires the two graphs (bundle.json "session")."""
        return {
            "ids": {"input": "ids", "rank": 1},
            "logits": "logits",
            "photo_index": "photo",
            "photo": {"grid": "grid"},
            "state": [{"input": "h", "output": "h_next", "init": "h0"}],
        }

    def graph_inputs(self, grid_cells: int) -> dict[str, tuple[Tensor, dict[int, str]]]:
        """Example tensors (distinct sizes > 1) and dynamic axes for each input of the decoder graph, in order."""
        return {
            "ids": (torch.ones(3, dtype=torch.long), {0: "rows"}),
            "photo": (torch.tensor([0, 1, 1]), {0: "rows"}),
            "grid": (torch.randn(2, self.heads, grid_cells, self.memory_dim // self.heads), {0: "batch"}),
            "h": (torch.randn(3, self.hidden), {0: "rows"}),
        }

    graph_outputs = ("logits", "h_next")

    def graph_form(self) -> GRUStep:
        """The decoder graph: one step for every row."""
        return GRUStep(self)
