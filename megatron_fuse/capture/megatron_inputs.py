"""A batch of conversations in the form that a GPTModel reads: packed into one sequence, or padded.

Legend: n conversations, s positions of a sequence.
"""

from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import pad

from megatron_fuse.capture.reading import ReadingBatch
from megatron_fuse.model.attention import PackedDocuments


@dataclass(frozen=True)
class ModelInput:
    tokens: Tensor  # int64 [n, s], packed [1, s]
    position_ids: Tensor  # int64, the same shape
    supervised: Tensor  # int64: places in the flattened tokens, whose next token is supervised
    packed: PackedDocuments | None
    own_length: int  # positions of hidden states on one of the ranks that share a sequence


def model_input(batch: ReadingBatch, config: TransformerConfig, device: torch.device) -> ModelInput:
    """The input on a device. The length is a multiple of the ranks that share a sequence.

    Conversations are packed into one sequence, without padding, if the layers allow it: Transformer Engine's
    do not in fp32.
    """
    shares = config.tensor_model_parallel_size if config.sequence_parallel else 1
    if config.transformer_impl == "local" or config.params_dtype is torch.bfloat16:
        return _packed(batch, shares, device)
    return _padded(batch, shares, device)


def _packed(batch: ReadingBatch, shares: int, device: torch.device) -> ModelInput:
    lengths = batch.mask.sum(1)
    starts = lengths.cumsum(0) - lengths
    row, column = batch.positions // batch.mask.shape[1], batch.positions % batch.mask.shape[1]
    tokens = batch.tokens[batch.mask.bool()]
    documents = lengths.tolist()
    if padding := -len(tokens) % shares:  # a document by itself, which nobody reads
        tokens = pad(tokens, (0, padding))
        documents.append(padding)
    bounds = torch.tensor([0, *documents]).cumsum(0).int().to(device)
    return ModelInput(
        tokens[None].to(device),
        torch.cat([torch.arange(length) for length in documents])[None].to(device),
        (starts[row] + column).to(device),
        PackedDocuments.of(tuple(documents), bounds),
        len(tokens) // shares,
    )


def _padded(batch: ReadingBatch, shares: int, device: torch.device) -> ModelInput:
    """Causal attention needs no mask, as the padding is on the right."""
    count, length = batch.tokens.shape
    padded = length + -length % shares
    row, column = batch.positions // length, batch.positions % length
    return ModelInput(
        pad(batch.tokens, (0, padded - length)).to(device),
        torch.arange(padded, device=device).expand(count, padded),
        (row * padded + column).to(device),
        None,
        padded // shares,
    )
