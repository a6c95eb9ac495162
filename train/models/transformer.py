"""A small transformer decoder (Vaswani et al. 2017, arXiv:1706.03762) that looks over the encoder's grid.

Pre-norm, learnt positions, GELU; the output layer shares the word embedding. A photo's keys and values are computed
once for it, whatever number of captions, beams and steps look at them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...runtime.errors import UsageError
from .attention import DecoderBlock, KeysValues, stack_layers
from .widths import Columns, Width, units


class TransformerDecoder(nn.Module):
    """Photo memory [N, L, D] and word ids in, logits out. The state is the KV cache of the words.

    dim: hidden and embedding size; layers; heads; ffn: the MLPs' size; dropout: on embeddings and on what each part of
    a layer adds, in [0, 1); max_positions: BOS, prompt and caption together; head_dim: size of an attention head,
    0 = dim / heads (which it no longer is once heads are pruned).
    """

    memory_kind = "grid"

    def __init__(
        self,
        memory_dim: int,
        vocab_size: int,
        *,
        dim: int = 256,
        layers: int = 3,
        heads: int = 4,
        ffn: int = 1024,
        dropout: float = 0.1,
        max_positions: int = 128,
        head_dim: int = 0,
    ) -> None:
        super().__init__()
        if dim % heads and not head_dim:
            raise ValueError(f"heads must divide dim ({heads}, {dim})")
        if layers < 1:
            raise ValueError(f"layers must be 1 or more, not {layers}")
        self.dim, self.layers, self.heads, self.ffn = dim, layers, heads, ffn
        self.head_dim, self.max_positions = head_dim or dim // heads, max_positions
        self.embedding = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(max_positions, dim)
        self.memory_norm = nn.LayerNorm(memory_dim)  # features come in whatever size the encoder gives them
        self.blocks = nn.ModuleList(
            DecoderBlock(dim, memory_dim, heads, ffn, dropout, self.head_dim) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        # PyTorch's default σ = 1 makes tied logits explode at the start; these are GPT-2's.
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def photo(self, memory: Tensor) -> dict[str, Tensor]:
        """Everything that is computed once per photo: each layer's keys and values [N, heads, L, size]."""
        memory = self.memory_norm(memory)
        pairs = [block.look.keys_values(memory) for block in self.blocks]
        names = (f"cross_{part}_{i}" for i in range(len(pairs)) for part in ("k", "v"))
        return dict(zip(names, (each for pair in pairs for each in pair), strict=True))

    def embed(self, ids: Tensor, places: Tensor) -> Tensor:
        """ids [B, T] at positions `places` [T] or [B, T] → [B, T, dim]."""
        return self.dropout(self.embedding(ids) + self.positions(places))

    def run(
        self,
        x: Tensor,
        photo: Sequence[KeysValues],
        remember: Callable[[int, Tensor, Tensor], KeysValues] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, dim] through every layer, normed; photo: each layer's keys and values. Without `mask` each position
        sees those before it. remember(layer, keys, values): as in SelfAttention."""
        for i, (block, pair) in enumerate(zip(self.blocks, photo, strict=True)):
            held = None if remember is None else partial(remember, i)
            x = block(x, pair, mask, causal=mask is None, remember=held)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., dim] → [..., V]."""
        return F.linear(hidden, self.embedding.weight)

    def forward(self, memory: Tensor, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        """Teacher forcing: memory [N, L, D], input ids [N, C, T] → logits [N, C, T, V]; with `keep` [N, C, T], those
        positions only: [K, V]."""
        n, captions, length = ids.shape
        if length > self.max_positions:
            need = f"{length} caption positions"
            raise UsageError(f"recipe [decoder]: max_positions = {self.max_positions} is too few for {need}")
        photo = list(_pairs(list(self.photo(memory).values())))
        words = self.embed(ids.flatten(0, 1), torch.arange(length, device=ids.device))  # [N·C, T, dim]
        hidden = self.run(words, photo).unflatten(0, (n, captions))  # [N, C, T, dim]
        return self.logits(hidden if keep is None else hidden[keep])

    def read(
        self, ids: Tensor, photo: Sequence[KeysValues], past: Sequence[KeysValues]
    ) -> tuple[Tensor, list[KeysValues]]:
        """ids [B, T], each row's photo and past per layer, keys and values [B, heads, length, size]
        → logits of the last position [B, V], present."""
        start, length = past[0][0].shape[2], ids.shape[1]
        places = torch.arange(length, device=ids.device) + start  # [T]
        mask = torch.arange(start + length, device=ids.device) <= places.unsqueeze(1)  # [T, length + T]
        present: list[KeysValues] = []

        def remember(layer: int, k: Tensor, v: Tensor) -> KeysValues:
            present.append((torch.cat((past[layer][0], k), 2), torch.cat((past[layer][1], v), 2)))
            return present[-1]

        hidden = self.run(self.embed(ids, places), photo, remember, mask)
        return self.logits(hidden[:, -1]), present

    # --- the two operations of a session, in torch -------------------------------------------------------------

    def begin(self, photo: dict[str, Tensor], ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Prefill BOS and prompt: ids [N, P] → logits [N, V], state (k and v stacked over layers)."""
        pairs = list(_pairs(list(photo.values())))
        empty = pairs[0][0].new_zeros(len(ids), self.heads, 0, self.head_dim)
        logits, present = self.read(ids, pairs, [(empty, empty)] * self.layers)
        return logits, stack_layers(present)

    def advance(
        self, ids: Tensor, index: Tensor, photo: dict[str, Tensor], state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """ids [B], photo index [B], state [B, layers, heads, length, size] → logits [B, V], next state."""
        seen = list(_pairs([each[index] for each in photo.values()]))
        past = [(state["k"][:, i], state["v"][:, i]) for i in range(self.layers)]
        logits, present = self.read(ids.unsqueeze(1), seen, past)
        return logits, stack_layers(present)

    # --- what pruning needs to know ----------------------------------------------------------------------------

    stack = "blocks"
    vocab_rows = ("embedding.weight",)

    def widths(self) -> list[Width]:
        """Each layer's MLP units, and the heads of both its attentions, each with its own keys and values."""
        found, ffn = [], units(self.ffn)
        head = torch.arange(self.heads * self.head_dim).view(self.heads, self.head_dim)
        two, three = (torch.cat([head + part * head.numel() for part in range(count)], 1) for count in (2, 3))
        cuts = (  # option, name for people, rows of linear layers, the layer that reads the units
            ("ffn", "ffn", {"feed.up": ffn}, "feed.down"),
            ("heads", "heads", {"attend.qkv": three}, "attend.out"),
            ("heads", "heads over the photo", {"look.q": head, "look.kv": two}, "look.out"),
        )
        for i in range(self.layers):
            at = f"{self.stack}.{i}"
            for key, where, parts, reader in cuts:
                rows = {f"{at}.{part}.{kind}": (0, cut) for part, cut in parts.items() for kind in ("weight", "bias")}
                readers = (Columns(f"{at}.{reader}", ffn if key == "ffn" else head),)
                found.append(Width(key, f"{where} of layer {i}", rows, readers))
        return found

    def follows(self, options: dict[str, int]) -> dict[str, int]:
        """The recipe's other settings that change with pruned ones."""
        return {"head_dim": self.head_dim} if "heads" in options else {}

    @contextmanager
    def without(self, layer: int) -> Iterator[None]:
        """Inside the block, teacher forcing skips a layer."""
        blocks = self.blocks
        self.blocks = nn.ModuleList(block for i, block in enumerate(blocks) if i != layer)
        try:
            yield
        finally:
            self.blocks = blocks

    # --- what the export needs to know -------------------------------------------------------------------------

    @property
    def photo_outputs(self) -> tuple[str, ...]:
        return tuple(f"cross_{part}_{i}" for i in range(self.layers) for part in ("k", "v"))

    @property
    def graph_outputs(self) -> tuple[str, ...]:
        return ("logits", *(role["output"] for role in self.session_roles()["kv"]))

    def session_roles(self) -> dict:
        """How the runtime wires the two graphs (bundle.json "session")."""
        sizes = {"heads": self.heads, "dim": self.head_dim}
        places = [f"{part}_{i}" for i in range(self.layers) for part in ("k", "v")]
        return {
            "ids": {"input": "ids", "rank": 2},
            "logits": "logits",
            "photo_index": "photo",
            "photo": {name: name for name in self.photo_outputs},
            "positions": self.max_positions,
            "kv": [{"input": f"past_{place}", "output": f"present_{place}", **sizes} for place in places],
        }

    def graph_inputs(self, grid_cells: int) -> dict[str, tuple[Tensor, dict[int, str]]]:
        """Example tensors (distinct sizes > 1) and dynamic axes for each input of the decoder graph, in order."""
        size = self.head_dim
        inputs = {
            "ids": (torch.ones(3, 5, dtype=torch.long), {0: "rows", 1: "length"}),
            "photo": (torch.tensor([0, 1, 1]), {0: "rows"}),
        }
        for name in self.photo_outputs:
            inputs[name] = (torch.randn(2, self.heads, grid_cells, size), {0: "batch"})
        for role in self.session_roles()["kv"]:
            inputs[role["input"]] = (torch.randn(3, self.heads, 7, size), {0: "rows", 2: "past_length"})
        return inputs

    def graph(self, ids: Tensor, photo: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """The decoder graph's forward: prefill (past length 0) and step in one. others: photo tensors, then past."""
        count = 2 * self.layers
        # index_select: exports as one Gather and keeps what is a photo's stored once per photo outside the graph.
        seen = [each.index_select(0, photo) for each in others[:count]]
        logits, present = self.read(ids, list(_pairs(seen)), list(_pairs(others[count:])))
        return logits, *(tensor for pair in present for tensor in pair)


def _pairs(tensors: Sequence[Tensor]) -> Iterator[KeysValues]:
    """Keys, values, keys, values → pairs."""
    return zip(tensors[0::2], tensors[1::2], strict=True)
