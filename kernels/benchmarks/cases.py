"""What is measured: shapes, data types and temperatures for each kind of machine, and what ours is held to
there.
"""

import dataclasses
from dataclasses import dataclass

import torch

MODES = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Target:
    """Of `provider`, all of a call: `figure` is at most `at_most` of what it is held against."""

    figure: str  # "p50_ms" or "peak_mb"
    # A provider of the same case; "pass": the time in which a copy at this run's rate moves the logits' bytes
    # once; "logits": their megabytes; "": the figure itself
    against: str
    at_most: float
    provider: str = "ours"

    @property
    def unit(self) -> str:
        if self.against == "":
            return self.figure.partition("_")[2]
        return {"pass": "passes", "logits": "of the logits"}.get(self.against, "")

    def __str__(self) -> str:
        return f"{self.provider}: {self.figure}" + (f" against {self.against}" if self.against else "")


@dataclass(frozen=True)
class Case:
    """One problem that every provider of a kernel solves."""

    # "sparse_kl": from logits [n, v]; "fused_linear": from hidden [n, h] and weight [v, h]; "top_k": what
    # capture keeps of logits
    kernel: str
    n: int
    v: int
    k: int
    temperature: float
    dtype: torch.dtype
    h: int | None = None
    softcap: float | None = None  # of the logits, only for "sparse_kl" without shards
    shards: int = 1  # of the vocabulary over a tensor-parallel group, of which the logits are one
    repeats: int = 9  # timed calls of each provider
    targets: tuple[Target, ...] = ()

    def __str__(self) -> str:
        hidden = f", h={self.h}" if self.h else ""
        part = f", one of {self.shards} shards" if self.shards > 1 else ""
        cap = f", softcap={self.softcap:g}" if self.softcap else ""
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"{self.n} x {self.v}{part}{hidden}, k={self.k}"
        return f"{self.kernel} {shape}, T={self.temperature:g}{cap}, {dtype}"

    @property
    def label(self) -> str:
        """Of its rows in the CSV file."""
        if self.softcap:
            return f"{self.kernel}_softcap"
        return f"{self.kernel}_shard" if self.shards > 1 else self.kernel

    @property
    def modes(self) -> tuple[str, ...]:
        """What of a call is told; the last is all of it."""
        return MODES[:1] if self.kernel == "top_k" else MODES

    @property
    def logits_bytes(self) -> int:
        return self.n * self.v * self.dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        return self.v * (self.h or 0) * self.dtype.itemsize

    def model_bytes(self, mode: str) -> int:
        """Bytes that the mathematics has to move, the same for every provider; GB/s counts these and no
        others.

        sparse_kl: the logits are read and their gradient is written, once each; a shard's logits are read
        again for it, after the collective. top_k: they are read.
        fused_linear: the same of hidden and weight; its logits need never reach memory. (It is bound by
        arithmetic.) Labels, teacher entries and per-row results are left out: less than a thousandth.
        """
        once = self.n * self.h * self.dtype.itemsize + self.weight_bytes if self.h else self.logits_bytes
        backward = 2 if self.shards > 1 else 1
        return once * {"forward": 1, "backward": backward, "forward+backward": 1 + backward}[mode]


def cpu_cases() -> list[Case]:
    targets = (
        Target("p50_ms", "dense eager", 1 / 8),
        Target("p50_ms", "dense torch.compile", 1 / 1.6),
        Target("peak_mb", "logits", 0.3),
    )
    base = Case("sparse_kl", 512, 32000, 10, 2.0, torch.float32)
    return [
        dataclasses.replace(base, targets=targets),
        dataclasses.replace(base, dtype=torch.bfloat16),
        dataclasses.replace(base, v=128256),
        *(dataclasses.replace(base, k=k) for k in (1, 64)),
        dataclasses.replace(base, softcap=30.0),
        Case("fused_linear", 2048, 32000, 10, 2.0, torch.float32, h=512, repeats=3),
    ]


_BASE = Case("sparse_kl", 8192, 128256, 10, 2.0, torch.bfloat16, repeats=30)


def headline_cases() -> list[Case]:
    """Those that targets are held to on every GPU."""
    whole = (
        Target("p50_ms", "pass", 2.2),  # the logits are read and their gradient is written: at least 2
        Target("p50_ms", "liger CE + sparse KL", 1 / 6),
    )
    # Before its gradient a shard waits for the others' statistics, and is read again.
    shard = (Target("p50_ms", "pass", 3.6),)
    # A chunk of 1024 rows of logits takes 263 MB, the hidden states' gradient 67.
    fused = tuple(
        Target(figure, against, at_most, provider="ours, main_grad, unit upstream")
        for figure, against, at_most in (("p50_ms", "unfused", 1.25), ("peak_mb", "", 340))
    )
    return [
        dataclasses.replace(_BASE, targets=whole),
        dataclasses.replace(_BASE, v=32064, shards=4, targets=shard),
        dataclasses.replace(_BASE, kernel="fused_linear", h=4096, repeats=10, targets=fused),
        dataclasses.replace(_BASE, kernel="top_k", targets=(Target("p50_ms", "pass", 1.3),)),
    ]


def gpu_cases() -> list[Case]:
    base = _BASE
    return [
        *headline_cases(),
        *(dataclasses.replace(base, v=v) for v in (32000, 50432, 151936, 262144)),
        dataclasses.replace(base, v=256000, softcap=30.0),  # Gemma 2
        *(dataclasses.replace(base, dtype=dtype) for dtype in (torch.float16, torch.float32)),
        # 3: no power of two, two exponentials.
        *(dataclasses.replace(base, temperature=t) for t in (1.0, 4.0, 3.0)),
        *(dataclasses.replace(base, k=k) for k in (1, 64, 128)),
    ]


def quick_cases() -> list[Case]:
    """Small enough to show in seconds that everything runs; their times mean nothing. 1003: rows not
    16-byte aligned.
    """
    return [
        Case("sparse_kl", 64, 1000, 4, 2.0, torch.float32, repeats=2),
        Case("sparse_kl", 48, 1003, 3, 3.0, torch.bfloat16, repeats=2),
        Case("sparse_kl", 64, 999, 4, 2.0, torch.float32, softcap=3.0, repeats=2),
        Case("sparse_kl", 48, 250, 3, 2.0, torch.float32, shards=4, repeats=2),
        Case("fused_linear", 64, 1000, 4, 2.0, torch.float32, h=32, repeats=2),
        Case("top_k", 64, 1000, 4, 2.0, torch.float32, repeats=2),
    ]
