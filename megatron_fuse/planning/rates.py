"""How fast a GPU is at the work of each stage: assumed shares of its data sheet, or rates that were measured.

Every assumption is a constant here, with its reason. `megatron-fuse check-gpu` measures the rates of a
machine, and `--rates FILE` puts them in the place of the assumptions.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_fuse.errors import UserError
from megatron_fuse.planning.gpus import Gpu
from megatron_fuse.storage.strict_json import parse_object, read_small_file
from megatron_fuse.text_safety import brief

# A training step's share of the dense bf16 rate. Published: 0.42 for 22B on A100 (Megatron-LM, arXiv
# 2205.05198); 0.51 on A100 and 0.33 on H100 for 7B, from the tokens/s that IBM's fms-fsdp states.
TRAINING_SHARE = 0.40
# A forward pass needs no gradients and no communication, but Hugging Face's layers are not fused.
READING_SHARE = 0.45
# A copy reaches 0.9 of the data sheet's bandwidth. Decoding also waits between its kernels.
BANDWIDTH_SHARE = 0.7
# Large messages of NCCL reach about this share of NVLink's and InfiniBand's rates.
LINK_SHARE = 0.7
# Bytes per second of one GPU to another node: 400 Gb/s InfiniBand for each GPU, as in NVIDIA's DGX H100.
NETWORK = 50e9
# Decoding in Hugging Face's eager mode starts about 20 kernels in a layer, each after some 30 microseconds of
# Python: 25 ms a token for 32 layers, whatever the GPU.
EAGER_LAYER_SECONDS = 0.8e-3
# A server replays the kernels of a step as a CUDA graph.
SERVED_LAYER_SECONDS = 0.06e-3


@dataclass(frozen=True)
class Rates:
    """Rates of one GPU.

    origins: what is measured or assumed, one text for each rate, to be printed.
    """

    training: float  # FLOP/s of a training step
    reading: float  # FLOP/s of a forward pass
    bandwidth: float  # bytes per second from the GPU's memory
    layer_seconds: float  # shortest time of one layer in one step of decoding in process
    link: float  # bytes per second to another GPU of the node
    network: float  # bytes per second to another node
    origins: dict[str, str] = field(default_factory=dict)


def assumed_rates(gpu: Gpu) -> Rates:
    """Shares of the GPU's data sheet."""
    rates = Rates(
        training=TRAINING_SHARE * gpu.flops,
        reading=READING_SHARE * gpu.flops,
        bandwidth=BANDWIDTH_SHARE * gpu.bandwidth,
        layer_seconds=EAGER_LAYER_SECONDS,
        link=LINK_SHARE * gpu.link,
        network=LINK_SHARE * NETWORK,
    )
    tera, giga = gpu.flops / 1e12, gpu.bandwidth / 1e9
    origins = {
        "training": f"assumed: {TRAINING_SHARE:.2f} of {tera:,.0f} TFLOP/s (dense bf16)",
        "reading": f"assumed: {READING_SHARE:.2f} of {tera:,.0f} TFLOP/s",
        "bandwidth": f"assumed: {BANDWIDTH_SHARE:.2f} of {giga:,.0f} GB/s",
        "layer_seconds": f"assumed: {1e3 * EAGER_LAYER_SECONDS:g} ms for each layer",
        "link": f"assumed: {LINK_SHARE:.2f} of {gpu.link / 1e9:,.0f} GB/s in one direction",
        "network": f"assumed: {LINK_SHARE:.2f} of {NETWORK / 1e9:,.0f} GB/s for each GPU",
    }
    return replace(rates, origins=origins)


@dataclass(frozen=True)
class Measured:
    """A row of check-gpu from which a rate is read: its check, the end of its name, its unit, and the unit's
    size.
    """

    check: str
    what: str
    unit: str
    size: float


# The local layers and Transformer Engine's both have a row of the training: the faster one counts.
MEASURED = {
    "training": Measured("training", "fusion: rate", "TFLOP/s", 1e12),
    "reading": Measured("reading", "capture: rate", "TFLOP/s", 1e12),
    "bandwidth": Measured("machine", "copy rate, read + written", "GB/s", 1e9),
    "layer_seconds": Measured("reading", "generation: a layer of a step", "ms", 1e-3),
}
"""The rates that `megatron-fuse check-gpu` measures on one GPU."""


def read_rates(path: Path, assumed: Rates) -> Rates:
    """The rates of a file that check-gpu has written (checks.jsonl); rates that it lacks stay as assumed.

    Raises UserError if the file cannot be read or has none of the rates.
    """
    found: dict[str, list[float]] = {}
    device = "a device without a name"
    for row in _rows(path):
        if (row.get("check"), row.get("what")) == ("machine", "device"):
            device = brief(str(row.get("value")), 80)
        for name, measured in MEASURED.items():
            value = row.get("value")
            if (
                row.get("check") == measured.check
                and str(row.get("what")).endswith(measured.what)
                and row.get("unit") == measured.unit
                and isinstance(value, int | float)
                and value > 0
            ):
                found.setdefault(name, []).append(value * measured.size)
    if not found:
        raise UserError(
            f"--rates {path}: no row has a rate. Name the checks.jsonl that `megatron-fuse check-gpu --only "
            "machine training reading` has written."
        )
    values = {name: min(values) if name == "layer_seconds" else max(values) for name, values in found.items()}
    origins = {
        name: f"measured on {device}: {value / MEASURED[name].size:,.4g} {MEASURED[name].unit}"
        for name, value in values.items()
    }
    return replace(assumed, **values, origins=assumed.origins | origins)


def _rows(path: Path) -> Iterator[dict]:
    for number, line in enumerate(read_small_file(path).splitlines(), 1):
        if line.strip():
            yield parse_object(line, f"--rates {path}, line {number}")
