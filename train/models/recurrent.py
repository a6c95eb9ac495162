"""What the recurrent decoders share: a look over the encoder's grid at every word, and a state of a few vectors.

Attention as in Xu et al. 2015 (arXiv:1502.03044) with scaled dot-product scores and several heads; the output layer
shares the word embedding (Press & Wolf 2017, arXiv:1608.05859).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .recurrent_graph import RecurrentStep, State
from .widths import Columns, Width, units


class RecurrentDecoder(nn.Module):
    """Photo memory [N, L, D] and word ids in, logits out. The state is one or more vectors [rows, hidden].

    A kind sets `gates` (how many [hidden] a step computes), `states` (the names of its vectors, the one that the
    attention and the output layer read first), `step_form` and `cell`.
    hidden: size of the state; embed: word-embedding size (tied with the output layer); heads: attention heads (divides
    the memory's dimension); dropout: on embeddings and before the output layer, in [0, 1).
    """

    memory_kind = "grid"
    gates: int
    states: tuple[str, ...]
    step_form: type[RecurrentStep]

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
        self.start = nn.Linear(memory_dim, len(self.states) * hidden)
        self.query = nn.Linear(hidden, memory_dim, bias=False)
        self.from_word = nn.Linear(embed, self.gates * hidden)
        self.from_context = nn.Linear(memory_dim, self.gates * hidden, bias=False)
        self.from_hidden = nn.Linear(hidden, self.gates * hidden)
        self.out = nn.Linear(hidden + memory_dim + embed, embed)
        self.out_bias = nn.Parameter(torch.zeros(vocab_size))
        self.dropout = nn.Dropout(dropout)
        self.initialise()

    def initialise(self) -> None:
        """First weights, where PyTorch's own do not serve."""
        # PyTorch's default σ = 1 makes tied logits explode at the start.
        nn.init.normal_(self.embedding.weight, std=0.05)
        nn.init.orthogonal_(self.from_hidden.weight)

    def cell(self, word_gates: Tensor, context: Tensor, state: State) -> State:
        """One step: word gates [..., gates · H], context [..., D], state of [..., H] each → the next state."""
        raise NotImplementedError

    def photo(self, memory: Tensor) -> dict[str, Tensor]:
        """Everything that is computed once per photo: memory [N, L, D] → the grid as the heads see it
        [N, heads, L, D / heads] and the first state, h0 [N, hidden] and so on."""
        grid = memory.unflatten(2, (self.heads, self.memory_dim // self.heads)).transpose(1, 2)
        first = torch.tanh(self.start(memory.mean(dim=1)))
        return {"grid": grid} | dict(zip(self.photo_outputs[1:], first.split(self.hidden, dim=1), strict=True))

    def attend(self, hidden: Tensor, grid: Tensor) -> Tensor:
        """Context [N, R, D] for R rows per photo: hidden [N, R, H], grid [N, heads, L, size]."""
        n, rows, _ = hidden.shape
        size = self.memory_dim // self.heads
        query = self.query(hidden).view(n, rows, self.heads, size).transpose(1, 2)  # [N, heads, R, size]
        weights = torch.softmax(query @ grid.transpose(2, 3) * size**-0.5, dim=-1)  # [N, heads, R, L]
        return (weights @ grid).transpose(1, 2).reshape(n, rows, self.memory_dim)

    def logits(self, features: Tensor) -> Tensor:
        """features [..., H + D + E] (hidden, context, word) → [..., V]."""
        out = self.out(self.dropout(features))
        return F.linear(self.dropout(out), self.embedding.weight, self.out_bias)

    def step(self, ids: Tensor, grid: Tensor, state: State) -> tuple[Tensor, State]:
        """One word for R rows per photo: ids [N, R], state of [N, R, H] each → logits [N, R, V], next state."""
        word = self.dropout(self.embedding(ids))
        context = self.attend(state[0], grid)
        state = self.cell(self.from_word(word), context, state)
        return self.logits(torch.cat((state[0], context, word), dim=-1)), state

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
        first = (photo[name] for name in self.photo_outputs[1:])
        state = tuple(each.unsqueeze(1).expand(-1, ids.shape[1], -1) for each in first)  # [N, C, H] each
        words = self.dropout(self.embedding(ids))  # [N, C, T, E]
        outputs, places = [], []
        for t in range(int(lengths.max())):
            n, c = int((lengths[:, 0] > t).sum()), int((lengths > t).any(0).sum())
            word, state = words[:n, :c, t], tuple(each[:n, :c] for each in state)
            context = self.attend(state[0], photo["grid"][:n])
            state = self.cell(self.from_word(word), context, state)
            active = lengths[:n, :c] > t
            outputs.append(torch.cat((state[0], context, word), dim=-1)[active])  # [k, H + D + E]
            places.append(torch.cat((active.nonzero(), active.nonzero().new_full((len(outputs[-1]), 1), t)), 1))
        place = torch.cat(places)  # [K, 3] in the sorted order
        row = order[place[:, 0]]
        flat = (row * ids.shape[1] + by_length[place[:, 0], place[:, 1]]) * ids.shape[2] + place[:, 2]
        return self.logits(torch.cat(outputs)[flat.argsort()])

    # --- the two operations of a session, in torch -------------------------------------------------------------

    def begin(self, photo: dict[str, Tensor], ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Feed BOS and the prompt: ids [N, P] → logits [N, V] after the last id, state."""
        state = {name: photo[start] for name, start in zip(self.states, self.photo_outputs[1:], strict=True)}
        index = torch.arange(len(ids), device=ids.device)
        for position in range(ids.shape[1]):
            logits, state = self.advance(ids[:, position], index, photo, state)
        return logits, state

    def advance(
        self, ids: Tensor, index: Tensor, photo: dict[str, Tensor], state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """ids [B], photo index [B], state of [B, H] each by name → logits [B, V], next state."""
        before = tuple(state[name].unsqueeze(1) for name in self.states)
        logits, after = self.step(ids.unsqueeze(1), photo["grid"][index], before)
        return logits.squeeze(1), {name: each.squeeze(1) for name, each in zip(self.states, after, strict=True)}

    def advance_rows(
        self, ids: Tensor, rows: Tensor, photo: dict[str, Tensor], state: dict[str, Tensor], *, captions: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `advance` for some `rows` [B] of `captions` rows a photo, numbered photo by photo. The grid is copied for
        none of them: cheap where a gradient flows through every step."""
        grid, before = photo["grid"], tuple(state[name] for name in self.states)
        word = self.dropout(self.embedding(ids))
        everyone = before[0].new_zeros(len(grid) * captions, self.hidden).index_copy(0, rows, before[0])
        context = self.attend(everyone.view(len(grid), captions, -1), grid).flatten(0, 1)[rows]  # [B, D]
        after = self.cell(self.from_word(word), context, before)
        logits = self.logits(torch.cat((after[0], context, word), dim=-1))
        return logits, dict(zip(self.states, after, strict=True))

    # --- what pruning needs to know ----------------------------------------------------------------------------

    vocab_rows = ("embedding.weight", "out_bias")

    def widths(self) -> list[Width]:
        """The hidden units: each is one row of every gate and first state, and one column of all that reads it."""
        unit = units(self.hidden)
        gates, starts = (
            torch.cat([unit + part * self.hidden for part in range(count)], dim=1)  # [H, count]
            for count in (self.gates, len(self.states))
        )
        rows = {name: (0, gates) for name in ("from_word.weight", "from_word.bias", "from_context.weight")}
        rows |= {name: (0, gates) for name in ("from_hidden.weight", "from_hidden.bias")}
        rows |= {name: (0, starts) for name in ("start.weight", "start.bias")}
        readers = tuple(Columns(name, unit) for name in ("out", "query", "from_hidden"))
        return [Width("hidden", "hidden units", rows, readers)]

    def follows(self, options: dict[str, int]) -> dict[str, int]:
        """The recipe's other settings that change with pruned ones."""
        return {}

    # --- what the export needs to know -------------------------------------------------------------------------

    @property
    def photo_outputs(self) -> tuple[str, ...]:
        return ("grid", *(f"{name}0" for name in self.states))

    @property
    def graph_outputs(self) -> tuple[str, ...]:
        return ("logits", *(f"{name}_next" for name in self.states))

    def session_roles(self) -> dict:
        """How the runtime wires the two graphs (bundle.json "session")."""
        return {
            "ids": {"input": "ids", "rank": 1},
            "logits": "logits",
            "photo_index": "photo",
            "photo": {"grid": "grid"},
            "state": [{"input": name, "output": f"{name}_next", "init": f"{name}0"} for name in self.states],
        }

    def graph_inputs(self, grid_cells: int) -> dict[str, tuple[Tensor, dict[int, str]]]:
        """Example tensors (distinct sizes > 1) and dynamic axes for each input of the decoder graph, in order."""
        return {
            "ids": (torch.ones(3, dtype=torch.long), {0: "rows"}),
            "photo": (torch.tensor([0, 1, 1]), {0: "rows"}),
            "grid": (torch.randn(2, self.heads, grid_cells, self.memory_dim // self.heads), {0: "batch"}),
            **{name: (torch.randn(3, self.hidden), {0: "rows"}) for name in self.states},
        }

    def graph_form(self) -> RecurrentStep:
        """The decoder graph: one step for every row."""
        return self.step_form(self)
