"""Core attention of the local layer spec over torch's scaled_dot_product_attention, which never holds [s, s] scores.

A position sees itself and those before it: of its sequence, of its document where several are packed into one, and of its
sliding window where the layer has one. None of that needs a mask of the whole sequence. Documents are attended one by one, which
costs the sum of their squared lengths, where one call under a block-diagonal mask costs the square of the sum. A window is a band
along the diagonal, attended block by block, and costs s (window + BLOCK).

Legend: s sequence, b batch, h query heads, g key/value heads (grouped queries), both of this rank, d channels of a head.
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

from megatron_fuse.errors import UserError

BLOCK = 256  # queries attended together under a window; the fastest of 128 to 1024 on a CPU, windows of 512 and 1024


@dataclass
class PackedDocuments(PackedSeqParams):
    """The documents of one packed sequence: as Megatron and Transformer Engine take them, and as the local layers do.

    lengths: positions of each document, on the host: to read cu_seqlens there would wait for the GPU.
    """

    lengths: tuple[int, ...] = ()

    @property
    def rotates_by_position(self) -> bool:
        """Whether the rotations come by position, so that Megatron need not know of documents where it applies them."""
        return self.qkv_format != "thd"

    def with_rotations_by_position(self) -> "PackedDocuments":
        """What Megatron takes for an unpacked sequence [s, 1, ...] everywhere but in CausalAttention."""
        # Megatron has no types: mypy does not know the fields of PackedSeqParams.
        return replace(self, qkv_format="sbhd")  # type: ignore[call-arg]


class CausalAttention(MegatronModule):
    """In the place of Megatron's DotProductAttention, which holds the scores and refuses packed sequences.

    The window is that of config.window_size, in the layers that config.window_attn_skip_freq leaves it to. Raises UserError where
    the config asks for what is not done here.
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
    ) -> None:
        super().__init__(config=config)
        for option, supported in {"attention_dropout": 0.0, "softmax_type": "vanilla"}.items():
            if getattr(config, option) != supported:
                raise UserError(
                    f"{option} is {getattr(config, option)!r}: attention on the local path takes only {supported!r}"
                )
        if attention_type != "self":
            raise UserError(f"attention_type is {attention_type!r}: a decoder's attention is 'self'")
        self.softmax_scale = softmax_scale  # None: 1 / sqrt(d)
        # Megatron counts what is seen beside the position itself: (to its left, to its right).
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

        Raises ValueError for a mask or a bias: what a position sees follows from its document and window alone.
        """
        if (
            attention_mask is not None
            or attention_bias is not None
            or attn_mask_type not in (None, AttnMaskType.causal)
        ):
            raise ValueError(
                "attention here is causal and takes no mask and no bias: give packed_seq_params or a window"
            )
        lengths = None if packed_seq_params is None else packed_seq_params.lengths
        context = causal_attention(query, key, value, lengths=lengths, window=self.window, scale=self.softmax_scale)
        return context.flatten(2)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: Sequence[int] | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale query key^T) value over what each position sees. query [s, b, h, d], key, value [s, b, g, d] -> [s, b, h, d].

    g divides h: query head i reads key/value head i // (h / g). lengths: positions of each document, which add up to s; None for
    one. window: positions that one sees, itself included; None for all before it. scale: None for 1 / sqrt(d).
    """
    if lengths is None:
        return _attend(query, key, value, window, scale).contiguous()
    # `split`, whose gradient is one concatenation; that of a slice is as long as the sequence, for every document.
    queries, keys, values = (of.split(list(lengths)) for of in (query, key, value))
    documents = zip(queries, keys, values, strict=True)
    return torch.cat([_attend(*document, window, scale) for document in documents]).contiguous()


def _attend(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float | None) -> Tensor:
    """One document."""
    query, key, value = (of.permute(1, 2, 0, 3) for of in (query, key, value))  # [b, h or g, s, d]
    length = query.shape[2]
    has_band = window is not None and length > window
    if not takes_groups(query.device, query.dtype, has_band):
        key, value = (of.repeat_interleave(query.shape[1] // of.shape[1], dim=1) for of in (key, value))
    attend = partial(scaled_dot_product_attention, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    if window is None or not has_band:
        return attend(query, key, value, is_causal=True).permute(2, 0, 1, 3)
    first = slice(window)  # a whole window of positions sees all before it
    parts = [attend(query[:, :, first], key[:, :, first], value[:, :, first], is_causal=True)]
    band = _band(BLOCK, window, query.device)
    for start in range(window, length, BLOCK):
        stop = min(start + BLOCK, length)
        seen = slice(start - window + 1, stop)
        mask = band[: stop - start, : stop - start + window - 1]
        parts.append(attend(query[:, :, start:stop], key[:, :, seen], value[:, :, seen], attn_mask=mask))
    return torch.cat(parts, dim=2).permute(2, 0, 1, 3)


def takes_groups(device: torch.device, dtype: torch.dtype, has_band: bool) -> bool:
    """Whether a kernel that holds no [s, s] scores takes fewer key/value heads than query heads.

    On a GPU the flash kernel does, but takes neither fp32 nor a mask; the memory-efficient one takes both, but no groups. A CPU's
    kernel takes all.
    """
    return device.type == "cpu" or (dtype in (torch.bfloat16, torch.float16) and not has_band)


def _band(queries: int, window: int, device: torch.device) -> Tensor:
    """[queries, queries + window - 1]: which of the keys, of which the first is the oldest that the first query sees."""
    distance = torch.arange(queries + window - 1, device=device) - torch.arange(queries, device=device)[:, None]
    return (distance >= 0) & (distance < window)
