"""The loss on a CPU: the chunked implementation beside the usual dense one, in the same run.

    python kernels/benchmarks/loss_cpu.py --threads 2 --csv runs/loss_cpu.csv

Forward and backward, alternating so that both meet the same neighbours on the machine. Memory is the peak of the resident
set above what was there before the call, in units of the logits; the gradient, 1.0 of them, is part of it (Linux only).
"""

import argparse
import csv
import ctypes
import datetime
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from fuse_kernels import sparse_kl_cross_entropy


def dense_eager(logits, labels, teacher_ids, teacher_logprobs, ce_weight, kl_weight, temperature):
    """Cross entropy and KL as they are usually written: a teacher tensor of the logits' size, two log-softmaxes."""
    z = logits.float()
    teacher = torch.zeros_like(z).scatter_add(1, teacher_ids, teacher_logprobs.exp())
    kl = F.kl_div(F.log_softmax(z / temperature, dim=-1), teacher, reduction="none").sum(-1)
    return ce_weight * F.cross_entropy(z, labels, reduction="none") + kl_weight * kl


def ours(logits, labels, teacher_ids, teacher_logprobs, ce_weight, kl_weight, temperature):
    weights = {"ce_weight": ce_weight, "kl_weight": kl_weight}
    options = {"temperature": temperature, "tail": "ignore", "implementation": "torch"}
    return sparse_kl_cross_entropy(logits, labels, teacher_ids, teacher_logprobs, **weights, **options)[0]


def ours_bucket(logits, labels, teacher_ids, teacher_logprobs, ce_weight, kl_weight, temperature):
    weights = {"ce_weight": ce_weight, "kl_weight": kl_weight}
    options = {"temperature": temperature, "tail": "bucket", "implementation": "torch"}
    return sparse_kl_cross_entropy(logits, labels, teacher_ids, teacher_logprobs, **weights, **options)[0]


# The dense way has no tail: "torch, ignore" is its equal, "torch, bucket" shows what the tail costs.
PROVIDERS: dict[str, Callable] = {"dense eager": dense_eager, "torch, ignore": ours, "torch, bucket": ours_bucket}
BASELINE = "dense eager"


def resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def measure(
    function: Callable, logits: torch.Tensor, rest: tuple, temperature: float
) -> tuple[float, float, torch.Tensor]:
    """Seconds, peak extra bytes and the gradient of one forward and backward."""
    logits = logits.detach().requires_grad_()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    start = time.perf_counter()
    function(logits, *rest, temperature).sum().backward()
    seconds = time.perf_counter() - start
    return seconds, resident("VmHWM") - before, logits.grad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--csv", type=Path, help="append one row per provider")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    n, v, k = options.rows, options.vocab, options.k
    logits = (torch.randn(n, v) * 3).to(getattr(torch, options.dtype))
    teacher_ids = torch.stack([torch.randperm(v)[:k] for _ in range(n)])
    teacher_logprobs = (torch.rand(n, k).softmax(1) * 0.9).log()
    ce_weight, kl_weight = torch.rand(n) / n, torch.rand(n) / n
    rest = (torch.randint(v, (n,)), teacher_ids, teacher_logprobs, ce_weight, kl_weight)

    gradients = {name: measure(function, logits, rest, options.temperature)[2] for name, function in PROVIDERS.items()}
    dense = gradients[BASELINE].float()
    error = (gradients["torch, ignore"].float() - dense).norm() / dense.norm()
    del gradients, dense
    seconds, extra = {name: [] for name in PROVIDERS}, dict.fromkeys(PROVIDERS, 0)
    for _ in range(options.repeats):
        for name, function in PROVIDERS.items():
            taken, peak, _ = measure(function, logits, rest, options.temperature)
            seconds[name].append(taken)
            extra[name] = max(extra[name], peak)

    size = logits.numel() * logits.element_size()
    baseline = statistics.median(seconds[BASELINE])
    print(f"{n} x {v}, k={k}, T={options.temperature:g}, {options.dtype}, {options.threads} thread(s), {processor()}")
    print(f"gradient, torch against dense: relative difference {error:.1e}")
    print(f"{'provider':16}{'ms (median)':>12}{'ms (best)':>12}{'ratio':>8}{'extra memory / logits':>24}")
    table = []
    for name in PROVIDERS:
        median, best = statistics.median(seconds[name]), min(seconds[name])
        ratio, memory = baseline / median, extra[name] / size
        print(f"{name:16}{median * 1e3:12.1f}{best * 1e3:12.1f}{ratio:8.2f}{memory:24.2f}")
        figures = {"ms_median": median * 1e3, "ms_best": best * 1e3, "ratio": ratio, "extra_memory": memory}
        shape = {"n": n, "v": v, "k": k, "temperature": options.temperature, "dtype": options.dtype}
        machine = {"threads": options.threads, "machine": processor(), "torch": torch.__version__}
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        table.append(
            {
                "kernel": "sparse_kl",
                "provider": name,
                "mode": "forward+backward",
                **shape,
                **figures,
                **machine,
                "date": date,
            }
        )
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        new = not options.csv.exists()
        with options.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, table[0].keys())
            if new:
                writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
