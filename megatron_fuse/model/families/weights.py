"""The weight table: of which Hugging Face tensors each Megatron parameter is made, on any tensor rank.

The same table gives the tensors' shapes, the rectangles that conversion copies, and the number of parameters
of a rank. The functions at the end are rows that several families share. A family composes its table of them.

Names of tensors within a layer are relative to the layer (`self_attn.q_proj.weight`). Names of parameters are
those of the local layer spec.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_fuse.model.architecture import Architecture

EMBEDDING, OUTPUT, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True)
class WeightBlock:
    """A rectangle that a Hugging Face tensor and a Megatron parameter share.

    It covers every dimension but `dim` completely.
    """

    tensor: str  # name of the Hugging Face tensor
    dim: int
    start: int  # first element along `dim` in the Hugging Face tensor
    at: int  # first element along `dim` in the Megatron parameter
    size: int  # elements along `dim`


@dataclass(frozen=True)
class Piece:
    """A range of a Hugging Face tensor along one dimension: the whole tensor, or a part of a fused one."""

    tensor: str
    length: int
    start: int = 0


@dataclass(frozen=True)
class Weight:
    """One Megatron parameter: pieces of Hugging Face tensors, cut into groups.

    The parameter holds the first group of each piece, then the second group of each, and so on. A rank holds
    its share of the groups. With one group per rank that is its part of each piece, one after the other.
    """

    pieces: tuple[Piece, ...]
    across: tuple[int, ...] = ()  # sizes of the dimensions that are not cut
    dim: int = 0  # the dimension that is cut
    groups: int | None = None  # None: one per rank
    split: bool = True  # False: every rank holds all of it
    padded: int | None = None  # the length that ranks share, if it is longer than the only piece

    def blocks(self, rank: int, ranks: int) -> Iterator[WeightBlock]:
        """What the tensor-parallel rank `rank` of `ranks` holds, in the order of the parameter."""
        rank, ranks = (rank, ranks) if self.split else (0, 1)
        groups = self.groups or ranks
        at = 0
        for group in range(rank * groups // ranks, (rank + 1) * groups // ranks):
            for piece in self.pieces:
                share = (self.padded or piece.length) // groups
                # Only padding lies beyond the piece.
                if (size := min(share, piece.length - group * share)) > 0:
                    yield WeightBlock(piece.tensor, self.dim, piece.start + group * share, at, size)
                at += share

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of the Hugging Face tensors. Pieces of one tensor cover it without gaps."""
        lengths: dict[str, int] = {}
        for piece in self.pieces:
            lengths[piece.tensor] = max(lengths.get(piece.tensor, 0), piece.start + piece.length)
        before, after = self.across[: self.dim], self.across[self.dim :]
        return {tensor: (*before, length, *after) for tensor, length in lengths.items()}

    def elements(self, ranks: int) -> int:
        """The parameter's elements on one of so many tensor-parallel ranks, padding included."""
        length = self.padded or sum(piece.length for piece in self.pieces)
        return prod(self.across) * length // (ranks if self.split else 1)


Table = Mapping[str, Weight]  # by the parameter's name


def separate(*tensors: tuple[str, int]) -> tuple[Piece, ...]:
    """A whole tensor per piece, by name and length."""
    return tuple(Piece(name, length) for name, length in tensors)


def fused(tensor: str, *lengths: int) -> tuple[Piece, ...]:
    """Consecutive parts of one tensor."""
    return tuple(Piece(tensor, length, sum(lengths[:index])) for index, length in enumerate(lengths))


def rows(tensor: str, length: int, *across: int) -> Weight:
    """A tensor whose first dimension the ranks share."""
    return Weight(separate((tensor, length)), across)


def columns(tensor: str, length: int, *across: int) -> Weight:
    """A tensor whose second dimension the ranks share."""
    return Weight(separate((tensor, length)), across, dim=1)


def whole(tensor: str, length: int, *across: int) -> Weight:
    """A vector, or a matrix, that every rank holds."""
    return Weight(separate((tensor, length)), across, split=False)


def vocabulary(tensor: str, a: Architecture) -> Weight:
    return Weight(separate((tensor, a.vocab_size)), (a.hidden_size,), padded=a.padded_vocab_size)


def query_key_value(a: Architecture, pieces: tuple[Piece, ...], *across: int) -> Weight:
    """linear_qkv holds for each key/value group the group's query heads, its key and its value.

    pieces: those of query, key and value, each with the heads in order.
    """
    return Weight(pieces, across, groups=a.num_query_groups)


def head_widths(a: Architecture) -> tuple[int, int, int]:
    """The widths of query, key and value: those of all heads together."""
    query, key = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    return query, key, key


def projections(a: Architecture) -> Table:
    """The matrices of a Llama layer, with the biases of query, key and value if the architecture has them."""
    return {
        **attention(a),
        "mlp.linear_fc1.weight": Weight(
            separate(("mlp.gate_proj.weight", a.ffn_hidden_size), ("mlp.up_proj.weight", a.ffn_hidden_size)),
            (a.hidden_size,),
        ),
        "mlp.linear_fc2.weight": columns("mlp.down_proj.weight", a.ffn_hidden_size, a.hidden_size),
    }


def attention(a: Architecture) -> Table:
    """The attention's part of `projections`."""
    names = ("q_proj", "k_proj", "v_proj")
    query_key_and_value = {
        kind: separate(
            *((f"self_attn.{name}.{kind}", n) for name, n in zip(names, head_widths(a), strict=True))
        )
        for kind in ("weight", "bias")
    }
    biases = {"self_attention.linear_qkv.bias": query_key_value(a, query_key_and_value["bias"])}
    return {
        "self_attention.linear_qkv.weight": query_key_value(a, query_key_and_value["weight"], a.hidden_size),
        **(biases if a.qkv_bias else {}),
        "self_attention.linear_proj.weight": columns(
            "self_attn.o_proj.weight", head_widths(a)[0], a.hidden_size
        ),
    }


def norms_before(a: Architecture) -> Table:
    """The norms of a Llama layer: before the attention and before the MLP."""
    return {
        "input_layernorm.weight": whole("input_layernorm.weight", a.hidden_size),
        "pre_mlp_layernorm.weight": whole("post_attention_layernorm.weight", a.hidden_size),
    }


def norms_after(a: Architecture) -> Table:
    """The norms after the attention and after the MLP."""
    return {
        "self_attention.linear_proj.post_layernorm.weight": whole(
            "post_attention_layernorm.weight", a.hidden_size
        ),
        "mlp.linear_fc2.post_layernorm.weight": whole("post_feedforward_layernorm.weight", a.hidden_size),
    }


def query_and_key_norms(a: Architecture) -> Table:
    """The norms of the queries and keys of each head, which have one weight for all heads."""
    return {
        "self_attention.q_layernorm.weight": whole("self_attn.q_norm.weight", a.head_dim),
        "self_attention.k_layernorm.weight": whole("self_attn.k_norm.weight", a.head_dim),
    }


def norms_over_all_heads(a: Architecture) -> Table:
    """The norms of the queries and of the keys over all heads together."""
    query, key, _ = head_widths(a)
    return {
        "self_attention.q_layernorm.weight": rows("self_attn.q_norm.weight", query),
        "self_attention.k_layernorm.weight": rows("self_attn.k_norm.weight", key),
    }


def llama_layer(a: Architecture) -> Table:
    return {**projections(a), **norms_before(a)}


def outside_layers(a: Architecture) -> Table:
    """Embedding, last norm and output layer, by absolute names. A tied output has the embedding's rows."""
    return {
        "embedding.word_embeddings.weight": vocabulary(EMBEDDING, a),
        "decoder.final_layernorm.weight": whole(FINAL_NORM, a.hidden_size),
        "output_layer.weight": vocabulary(EMBEDDING if a.tied_embeddings else OUTPUT, a),
    }
