"""Model FLOPs, and what share of the machine's they are (MFU, Chowdhery et al. 2022, PaLM, appendix B)."""

import numpy as np
import torch

from megatron_fuse.model.architecture import Architecture

# Dense bf16 FLOP/s by what torch.cuda.get_device_name holds, from NVIDIA's data sheets; the first that fits counts.
PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,  # of every H200 and of the H100 SXM
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of one GPU, None for one that the table does not know."""
    return next((flops for name, flops in PEAK_BF16_FLOPS.items() if name in device_name), None)


def peak_flops_of_this_gpu() -> float | None:
    """peak_flops of the current device, None on a CPU."""
    return peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def multiplying_parameters(architecture: Architecture) -> int:
    """Weights that every token is multiplied with: of all layers and of the output layer, whose padded columns do not count.

    Not the embedding, which is looked up, unless it is the output layer too; not norms and biases.
    """
    a = architecture
    attention = 2 * a.hidden_size * a.head_dim * (a.num_attention_heads + a.num_query_groups)
    mlp = 3 * a.hidden_size * a.ffn_hidden_size
    return a.num_layers * (attention + mlp) + a.hidden_size * a.vocab_size


def training_flops(architecture: Architecture, positions: np.ndarray) -> float:
    """Model FLOPs of forward and backward over documents of so many input positions, recomputation not counted.

    6 N per position, N the multiplying parameters; and 12 (layers) (heads) (head_dim) per pair of a position and one that it
    sees, itself included: two products forward, twice as many backward, two FLOPs each. A document of l positions has
    l (l + 1) / 2 pairs under a causal mask.
    """
    a = architecture
    l = positions.astype(np.float64)  # noqa: E741
    per_pair = 12.0 * a.num_layers * a.num_attention_heads * a.head_dim
    return float(6.0 * multiplying_parameters(a) * l.sum() + per_pair * (l * (l + 1) / 2).sum())
