"""Core attention of the local layer spec, by torch's scaled_dot_product_attention, which never holds the
scores [s, s].

A position sees itself and earlier positions of its sequence. If several documents are packed into one
sequence, it sees only those of its own document. If the layer has a sliding window, it sees only those within
the window. None of that needs a mask of the whole sequence:

- Documents are attended one by one. That costs the sum of their squared lengths; one call with a
block-diagonal mask would cost the
  square of the sum.
- A window is a band along the diagonal. It is attended block by block, which costs s (window + BLOCK).

torch's function has no soft cap of the scores. With one, blocks of queries are attended in plain operations,
and computed again in the backward pass.

Legend: s sequence, b batch, h query heads, g key/value heads (grouped queries), both of this rank, d channels
of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from megatron_fuse.errors import UserError

# Queries attended together under a window.
# On a CPU, with windows of 512 and 1024, the fastest of 128 to 1024.
BLOCK = 256


@dataclass
class PackedDocuments(PackedSeqParams):
    """The documents of one packed sequence, in the forms of Megatron and Transformer Engine and of the local
    layers.

    lengths: positions of each document, on the host. Reading them from cu_seqlens would wait for the GPU.
    """

    lengths: tuple[int, ...] = ()

    @classmethod
    def of(cls, lengths: tuple[int, ...], cu_seqlens: Tensor) -> "PackedDocuments":
        """Documents one after the other. cu_seqlens int32 [documents + 1]: their bounds, on the device."""
        longest = max(lengths)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            lengths=lengths,
        )

    @property
    def rotates_by_position(self) -> bool:
        """Whether there is one rotation per position,
        so that Megatron can apply them without the documents' bounds."""
        return self.qkv_format != "thd"

    def with_rotations_by_position(self) -> "PackedDocuments":
        """The same documents, marked so that Megatron treats the sequence as unpacked, [s, 1, ...].
        CausalAttention reads `lengths`."""
        # Megatron has no types: mypy does not know the fields of PackedSeqParams.
        return replace(self, qkv_format="sbhd")  # type: ignore[call-arg]


class CausalAttention(MegatronModule):
    """Replaces Megatron's DotProductAttention, which holds the scores and refuses packed sequences.

    Layers with a window by config.window_attn_skip_freq use the window of config.window_size. Raises
    UserError if the config asks for dropout, another softmax or another kind of attention,
    which are not supported here.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__(config=config)
        for option, supported in {"attention_dropout": 0.0, "softmax_type": "vanilla"}.items():
            if getattr(config, option) != supported:
                raise UserError(
                    f"{option} is {getattr(config, option)!r}, but local attention supports only "
                    f"{supported!r}"
                )
        if attention_type != "self":
            raise UserError(f"attention_type is {attention_type!r}, but a decoder's attention is 'self'")
        self.softmax_scale = softmax_scale  # None: 1 / sqrt(d)
        self.softcap = softcap
        # Megatron's window_size counts the visible positions to the (left, right) of a position,
        # without the position itself.
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: None = None,
        packed_seq_params: PackedDocuments | None = None,
    ) -> Tensor:
        """query [s, b, h, d], key and value [s, b, g, d] -> [s, b, h d].

        Raises ValueError for a mask or a bias: the document and the window alone decide what a position sees.
        """
        if (
            attention_mask is not None
            or attention_bias is not None
            or attn_mask_type not in (None, AttnMaskType.causal)
        ):
            raise ValueError(
                "this attention is causal and takes no mask and no bias: give packed_seq_params or a window"
            )
        lengths = None if packed_seq_params is None else packed_seq_params.lengths
        context = causal_attention(
            query,
            key,
            value,
            lengths=lengths,
            window=self.window,
            scale=self.softmax_scale,
            softcap=self.softcap,
        )
        return context.flatten(2)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: Sequence[int] | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scale query key^T) value over the positions that each position sees.

    query [s, b, h, d], key and value [s, b, g, d] -> [s, b, h, d]. g divides h:
    query head i reads key/value head i // (h / g).
    lengths: positions of each document; they add up to s. None: one document.
    window: number of positions that a position sees, itself included. None: all before it.
    scale: None for 1 / sqrt(d).
    softcap: scores x become softcap tanh(x / softcap). None: they stay.
    """
    attend = partial(_attend, window=window, scale=scale)
    if softcap is not None:
        attend = partial(_attend_capped, window=window, scale=scale, softcap=softcap)
    if lengths is None:
        return attend(query, key, value).contiguous()
    # `split` and not slices: the gradient of a split is one concatenation, while each slice has a gradient of
    # the sequence's length.
    queries, keys, values = (tensor.split(list(lengths)) for tensor in (query, key, value))
    documents = zip(queries, keys, values, strict=True)
    return torch.cat([attend(*document) for document in documents]).contiguous()


def _attend(query: Tensor, key: Tensor, value: Tensor, *, window: int | None, scale: float | None) -> Tensor:
    """Attention of one document, or of one unpacked sequence;
    shapes as in causal_attention, with s of the document."""
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [b, h or g, s, d]
    length = query.shape[2]
    # A document that is no longer than the window needs no band.
    has_band = window is not None and length > window
    if not takes_groups(query.device, query.dtype, has_band):
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    attend = partial(scaled_dot_product_attention, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    if window is None or not has_band:
        return attend(query, key, value, is_causal=True).permute(2, 0, 1, 3)
    # The first `window` positions see all positions before them: plain causal attention, without a mask.
    first = slice(window)
    parts = [attend(query[:, :, first], key[:, :, first], value[:, :, first], is_causal=True)]
    # From there on a block of queries sees the keys from `window` - 1 before its first query up to its last
    # query. All blocks share one mask; the last block, which may be shorter, takes its upper left part.
    band = _band(BLOCK, window, query.device)
    for start in range(window, length, BLOCK):
        stop = min(start + BLOCK, length)
        seen = slice(start - window + 1, stop)
        mask = band[: stop - start, : stop - start + window - 1]
        parts.append(attend(query[:, :, start:stop], key[:, :, seen], value[:, :, seen], attn_mask=mask))
    return torch.cat(parts, dim=2).permute(2, 0, 1, 3)


def _attend_capped(
    query: Tensor, key: Tensor, value: Tensor, *, window: int | None, scale: float | None, softcap: float
) -> Tensor:
    """As _attend, with capped scores. A block of queries has its scores [b, h, BLOCK, keys] for a moment."""
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [b, h or g, s, d]
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scale = query.shape[3] ** -0.5 if scale is None else scale
    parts = []
    for start in range(0, max(length, 1), BLOCK):  # of an empty document, one empty block
        stop = min(start + BLOCK, length)
        first = 0 if window is None else max(0, start - window + 1)
        distance = torch.arange(start, stop, device=query.device)[:, None] - torch.arange(
            first, stop, device=query.device
        )
        seen = (distance >= 0) & (distance < (window or length))
        block = (query[:, :, start:stop], key[:, :, first:stop], value[:, :, first:stop], seen)
        parts.append(
            checkpoint(_attend_block, *block, scale, softcap, use_reentrant=False, preserve_rng_state=False)
        )
    return torch.cat(parts, dim=2).permute(2, 0, 1, 3)


def _attend_block(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float, softcap: float
) -> Tensor:
    """query [b, h, q, d], key and value [b, h, k, d], seen bool [q, k] -> [b, h, q, d]."""
    scores = query @ key.transpose(2, 3) * scale
    scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~seen, -torch.inf)
    # At least in fp32, as transformers does.
    softmax_dtype = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=softmax_dtype).to(value.dtype) @ value


def takes_groups(device: torch.device, dtype: torch.dtype, has_band: bool) -> bool:
    """Whether torch has a kernel here that takes fewer key/value heads than query heads and does not hold the
    scores [s, s].

    On a GPU the flash kernel takes groups, but neither fp32 nor a mask. The memory-efficient kernel takes
    fp32 and a mask, but no groups. The CPU's kernel takes all of them.
    """
    return device.type == "cpu" or (dtype in (torch.bfloat16, torch.float16) and not has_band)


def _band(queries: int, window: int, device: torch.device) -> Tensor:
    """bool [queries, queries + window - 1]: which keys each query sees.

    Key 0 is the oldest key that query 0 sees.
    """
    distance = (
        torch.arange(queries + window - 1, device=device) - torch.arange(queries, device=device)[:, None]
    )
    return (distance >= 0) & (distance < window)
