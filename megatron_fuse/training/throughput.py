"""Model FLOPs, and the GPUs' peak FLOP/s that MFU compares them with
(Chowdhery et al. 2022, PaLM, appendix B)."""

import numpy as np
import torch

from megatron_fuse.model.architecture import Architecture

# Dense bf16 FLOP/s by a part of torch.cuda.get_device_name, from NVIDIA's data sheets. The first key that
# occurs in the name counts.
PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,  # of every H200 and of the H100 SXM
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,  # with sums in fp32 (NVIDIA's white paper on Ada, appendix A)
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of one GPU, None if the table does not have it."""
    return next((flops for name, flops in PEAK_BF16_FLOPS.items() if name in device_name), None)


def peak_flops_of_this_gpu() -> float | None:
    """peak_flops of the current device, None on a CPU."""
    return peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def multiplying_parameters(architecture: Architecture) -> int:
    """The number of weights that every token is multiplied with:
    those of all layers, and of the output layer without padding.

    The embedding counts only if it is also the output layer: otherwise it is only looked up. Norms, biases
    and the experts that a token does not use do not count.
    """
    a = architecture
    attention = 2 * a.hidden_size * a.head_dim * (a.num_attention_heads + a.num_query_groups)
    mlp = 3 * a.hidden_size * a.ffn_width
    router = 0 if a.experts is None else a.hidden_size * a.experts.count
    return a.num_layers * (attention + mlp + router) + a.hidden_size * a.vocab_size


def training_flops(architecture: Architecture, positions: np.ndarray) -> float:
    """Model FLOPs of forward and backward pass over documents of so many input positions [documents].
    Recomputation does not count.

    Each position takes 6 N, with N the multiplying parameters. Each pair of a position and a position that it
    sees, itself included, takes 12 (layers) (heads) (head_dim): two products forward, twice as many backward,
    two FLOPs each. Under a causal mask a document of l positions has l (l + 1) / 2 pairs.
    """
    a = architecture
    l = positions.astype(np.float64)  # noqa: E741
    per_pair = 12.0 * a.num_layers * a.num_attention_heads * a.head_dim
    return float(6.0 * multiplying_parameters(a) * l.sum() + per_pair * (l * (l + 1) / 2).sum())
