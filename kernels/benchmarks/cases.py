"""What is measured: shapes, data types and temperatures for each kind of machine, and what ours is held to there."""

import dataclasses
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """Of `provider`, forward+backward: `figure` is at most `at_most` of what it is held against."""

    figure: str  # "p50_ms" or "peak_mb"
    against: str  # a provider of the same case, "logits" (their megabytes), or "" for the figure itself
    at_most: float
    machine: str = ""  # counts only where the machine's name holds this
    provider: str = "ours"


@dataclass(frozen=True)
class Case:
    """One problem that every provider of a kernel solves."""

    kernel: str  # "sparse_kl": from logits [n, v]; "fused_linear": from hidden [n, h] and weight [v, h]
    n: int
    v: int
    k: int
    temperature: float
    dtype: torch.dtype
    h: int | None = None
    repeats: int = 9  # timed calls of each provider
    targets: tuple[Target, ...] = ()

    def __str__(self) -> str:
        hidden = f", h={self.h}" if self.h else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kernel} {self.n} x {self.v}{hidden}, k={self.k}, T={self.temperature:g}, {dtype}"

    @property
    def logits_bytes(self) -> int:
        return self.n * self.v * self.dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        return self.v * (self.h or 0) * self.dtype.itemsize

    def model_bytes(self, mode: str) -> int:
        """Bytes that the mathematics has to move, the same for every provider; GB/s counts these and no others.

        sparse_kl: forward reads the logits once; backward reads them once and writes their gradient once.
        fused_linear: the same of hidden and weight; its logits need never reach memory. (It is bound by arithmetic.)
        Labels, teacher entries and per-row results are left out: less than a thousandth.
        """
        once = self.n * self.h * self.dtype.itemsize + self.weight_bytes if self.h else self.logits_bytes
        return once * {"forward": 1, "backward": 2, "forward+backward": 3}[mode]


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
        Case("fused_linear", 2048, 32000, 10, 2.0, torch.float32, h=512, repeats=3),
    ]


def gpu_cases() -> list[Case]:
    targets = (
        Target("p50_ms", "", 1.73, machine="H200"),  # 85 % of the copy rate, 4.3 TB/s
        Target("p50_ms", "liger CE + sparse KL", 1 / 4),
    )
    base = Case("sparse_kl", 8192, 128256, 10, 2.0, torch.bfloat16, repeats=30)
    memory = Target("peak_mb", "unfused", 1 / 4, provider="ours, main_grad")
    return [
        dataclasses.replace(base, targets=targets),
        *(dataclasses.replace(base, v=v) for v in (32000, 50432, 151936, 262144)),
        *(dataclasses.replace(base, dtype=dtype) for dtype in (torch.float16, torch.float32)),
        *(dataclasses.replace(base, temperature=t) for t in (1.0, 4.0, 3.0)),  # 3: no power of two, two exponentials
        *(dataclasses.replace(base, k=k) for k in (1, 64, 128)),
        Case("fused_linear", 8192, 128256, 10, 2.0, torch.bfloat16, h=4096, repeats=30, targets=(memory,)),
    ]


def quick_cases() -> list[Case]:
    """Small enough to show in seconds that everything runs; their times mean nothing. 1003: rows not 16-byte aligned."""
    return [
        Case("sparse_kl", 64, 1000, 4, 2.0, torch.float32, repeats=2),
        Case("sparse_kl", 48, 1003, 3, 3.0, torch.bfloat16, repeats=2),
        Case("fused_linear", 64, 1000, 4, 2.0, torch.float32, h=32, repeats=2),
    ]
