"""The GPUs that a plan may be for, by what their makers state: memory, FLOP/s, and bytes per second."""

import re
from dataclasses import dataclass

from megatron_fuse.errors import UserError
from megatron_fuse.training.throughput import PEAK_BF16_FLOPS


@dataclass(frozen=True)
class Gpu:
    """One GPU. Bytes and seconds, decimal, as data sheets state them."""

    name: str
    memory: float
    flops: float  # dense bf16 FLOP/s
    bandwidth: float  # bytes per second between the GPU and its memory
    link: float  # bytes per second to another GPU of the node, in one direction


# NVLink's rates on data sheets are of both directions together: half of each is given here.
GPUS = {
    gpu.name: gpu
    for gpu in (
        # "NVIDIA A100 Tensor Core GPU" data sheet, SXM: 40 GB, 1,555 GB/s; 80 GB, 2,039 GB/s; NVLink 600 GB/s
        Gpu("A100-40", 40e9, PEAK_BF16_FLOPS["A100"], 1555e9, 300e9),
        Gpu("A100-80", 80e9, PEAK_BF16_FLOPS["A100"], 2039e9, 300e9),
        # "NVIDIA H100 Tensor Core GPU" data sheet, SXM: 80 GB, 3.35 TB/s, NVLink 900 GB/s
        Gpu("H100-80", 80e9, PEAK_BF16_FLOPS["H100"], 3350e9, 450e9),
        # "NVIDIA H200 Tensor Core GPU" data sheet: 141 GB, 4.8 TB/s, NVLink 900 GB/s
        Gpu("H200-141", 141e9, PEAK_BF16_FLOPS["H200"], 4800e9, 450e9),
        # "NVIDIA DGX B200" data sheet: 8 GPUs with 1,440 GB and 64 TB/s together, NVLink 1.8 TB/s each
        Gpu("B200-180", 180e9, PEAK_BF16_FLOPS["B200"], 8000e9, 900e9),
        # "NVIDIA L40S" data sheet: 48 GB, 864 GB/s, PCIe 4.0 x 16, 64 GB/s in both directions
        Gpu("L40S-48", 48e9, PEAK_BF16_FLOPS["L40S"], 864e9, 32e9),
        # "NVIDIA Ada GPU architecture" white paper: 24 GB, 1,008 GB/s, PCIe 4.0 x 16
        Gpu("RTX4090-24", 24e9, PEAK_BF16_FLOPS["RTX 4090"], 1008e9, 32e9),
    )
}


@dataclass(frozen=True)
class Cluster:
    """Equal nodes with equal GPUs."""

    gpu: Gpu
    per_node: int
    nodes: int = 1

    @property
    def gpus(self) -> int:
        return self.per_node * self.nodes

    def __str__(self) -> str:
        of_nodes = f"{self.nodes} nodes with " if self.nodes > 1 else ""
        return f"{of_nodes}{self.per_node} x {self.gpu.name}"


def parse_cluster(text: str, nodes: int = 1) -> Cluster:
    """The cluster of `--gpus 8xH100-80 --nodes 4`: 8 GPUs on each of 4 nodes; without a number, one GPU.

    Raises UserError, which lists the GPUs, for another form or an unknown GPU.
    """
    form = re.fullmatch(r"(?:([1-9]\d{0,3})x)?(\S+)", text.strip(), re.IGNORECASE)
    by_name = {name.casefold(): gpu for name, gpu in GPUS.items()}
    gpu = by_name.get(form[2].casefold()) if form else None
    if form is None or gpu is None:
        raise UserError(
            f"--gpus is {text!r}, but must be the number of GPUs of a node and their name, as in 8xH100-80. "
            f"The GPUs are {', '.join(GPUS)}."
        )
    if not 1 <= nodes <= 4096:
        raise UserError(f"--nodes is {nodes}, but it must be from 1 to 4096")
    return Cluster(gpu, int(form[1] or 1), nodes)
